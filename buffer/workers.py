"""Transitions of workers: death and delay. Rules 5 and 7 of docs/buffer.md."""

from collections.abc import Mapping
from typing import TypeVar

from buffer.rules import Rules
from buffer.state import Hold, Record, State, Step, place_of, record_all, without, work_of
from buffer.training import settled

Key = TypeVar("Key", str, tuple[str, str])


def worker_died(rules: Rules, state: State, worker: str, node_lives: bool, now: float) -> Step:
    """Its claims, leases and batch go back. A death is not the work's fault, but for a picture tried alone; five at
    the same work, while the nodes live, stop the run (`Rules.stop`)."""
    claims, lost_orders = _released(state.claims, worker)
    leases, lost_leases = _released(state.leases, worker)
    lost = [(order_id, "") for order_id in lost_orders] + list(lost_leases)
    picture = state.alone.get(worker)
    taken = state.taken
    if taken is not None and taken.worker == worker:
        lost.append((f"batch {state.next_batch}", ""))
        taken = None
    deaths = dict(state.deaths)
    if node_lives and picture is None:
        for work in lost:
            deaths[work] = deaths.get(work, 0) + 1
    state = state._replace(
        claims=claims,
        leases=leases,
        taken=taken,
        deaths=deaths,
        alone=without(state.alone, worker),
        asked={asked: time for asked, time in state.asked.items() if asked[1] != place_of(worker)},
    )
    for order_id, reward in lost_leases:
        if picture in rules.sizes.trajectory_ids(order_id):
            return _killed_by(rules, state, picture, order_id, reward, worker, now)
    return Step(state)


def _killed_by(
    rules: Rules, state: State, picture: int | None, order_id: str, reward: str, worker: str, now: float
) -> Step:
    reason = f"{reward}: the worker died on this picture alone"
    record: Record = {
        "kind": "failed",
        "order": order_id,
        "reward": reward,
        "worker": worker,
        "pictures": [picture],
        "reasons": [reason],
        "time": now,
    }
    step = record_all(state, record)
    if not rules.is_set_aside(state, reward, dict(work_of(step.state, order_id).failures)[reward, picture], now):
        return step
    aside: Record = {"kind": "set_aside", "order": order_id, "pictures": [picture], "reason": reason}
    return settled(rules, Step(record_all(step.state, aside).state, (record, aside)), order_id)


def overdue(rules: Rules, state: State, now: float) -> list[str]:
    """Workers that the fleet kills: they hold a claim for twice its time-out, or a lease or the batch for longer than
    its own.

    A slow rollout may still be in time; a reward that does not answer hangs, and its pool has others to do. Nobody is
    late with what nobody waits for any more, because the others' failures set it aside.
    """
    late = []
    for order_id, holds in state.claims.items():
        if rules.to_roll_out(state, order_id):
            late += rules.overdue(holds, 2 * rules.claim_timeout_s, now)
    for (order_id, reward), holds in state.leases.items():
        if rules.to_score(state, order_id, reward):
            late += rules.overdue(holds, rules.lease_timeouts[reward], now)
    late += rules.overdue((state.taken,) if state.taken else (), rules.train_timeout_s, now)
    return sorted(set(late))


def excused(state: State, seconds: float) -> State:
    """The buffer kept everybody waiting for so long, say by a slow disk: nobody is late by that."""

    def later(holds: tuple[Hold, ...]) -> tuple[Hold, ...]:
        return tuple(hold._replace(since=hold.since + seconds) for hold in holds)

    return state._replace(
        claims={key: later(holds) for key, holds in state.claims.items()},
        leases={key: later(holds) for key, holds in state.leases.items()},
        taken=later((state.taken,))[0] if state.taken else None,
        asked={asked: time + seconds for asked, time in state.asked.items()},
    )


def _released(held: Mapping[Key, tuple[Hold, ...]], worker: str) -> tuple[dict[Key, tuple[Hold, ...]], list[Key]]:
    left: dict[Key, tuple[Hold, ...]] = {}
    lost: list[Key] = []
    for key, holds in held.items():
        others = tuple(hold for hold in holds if hold.worker != worker)
        if others:
            left[key] = others
        if len(others) < len(holds):
            lost.append(key)
    return left, lost
