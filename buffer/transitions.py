"""The transitions: what a call, a death or a delay makes of the state.

Each is a pure function of (rules, state, the call) and gives a `Step`. Numbers in brackets are those of the rules in
docs/buffer.md.
"""

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from buffer.orders import Evaluation, Version, parse
from buffer.protocol import Charged, Refused
from buffer.rules import ALONE_AFTER, Rules
from buffer.state import File, Hold, Record, Rollout, State, Step, Trained, fold, place_of, record_all, without, work_of

Key = TypeVar("Key", str, tuple[str, str])

# ---- rollouts


def publish(rules: Rules, state: State, version: Version) -> Step:
    """The driver has put the weights of a trained version where samplers find them. Lasts for the epoch."""
    if not (0 <= version.number < len(state.trained)) or state.trained[version.number].version != version:
        raise Refused(f"Version {version.number} ({version.digest}) is not one that the journal has as trained.")
    return Step(state._replace(published=(state.published | {version.number}) & rules.served(state)))


def claim(rules: Rules, state: State, worker: str, now: float) -> Step:
    """Answer: (order id, version), or None if nothing may be claimed now."""
    state = state._replace(asked={**state.asked, ("", place_of(worker)): now})
    bound = {o: version for o in rules.claimable(state) if (version := rules.binding(state, o)) is not None}
    order_id = _given(rules, state, "", worker, bound, now)
    if order_id is None:
        return Step(state)
    version, holds = bound[order_id], state.claims.get(order_id, ())
    if rules.held(holds, worker):
        return Step(state, (), (order_id, version))
    record: Record = {"kind": "claimed", "order": order_id, "version": version, "worker": worker, "time": now}
    step = record_all(state, record)
    state = step.state._replace(claims={**state.claims, order_id: (*holds, Hold(worker, now))})
    return Step(state, step.records, (order_id, version))


def accepts(rules: Rules, state: State, order_id: str, version: Version) -> bool:
    """Whether `add` would count. Asked first, so that only a table that counts is written."""
    return not rules.closed(state, order_id) and rules.counts(work_of(state, order_id), version)


def add(rules: Rules, state: State, order_id: str, version: Version, rollout: Rollout, now: float) -> Step:
    """An order was rolled out and its files are written. Answer: whether they count; later or unbound ones change
    nothing.

    Nobody asks who holds the claim: if only holders were heard, an order slower than its time-out would never end.
    """
    if not accepts(rules, state, order_id, version):
        return Step(state, (), False)
    record = {"kind": "rolled_out", "order": order_id, **rollout._asdict(), "time": now}
    step = record_all(state, record)
    deaths = without(step.state.deaths, (order_id, ""))
    step = step._replace(state=step.state._replace(claims=without(state.claims, order_id), deaths=deaths))
    return settled(rules, step, order_id)._replace(answer=True)


def order_failed(rules: Rules, state: State, order_id: str, worker: str, message: str, now: float) -> Step:
    """The rollout raised. It counts against the order, once for each claim; at the third its pictures are set aside."""
    claims, lost = _released(state.claims, worker, order_id)
    if not lost:
        return Step(state)
    return _failed(rules, state._replace(claims=claims), order_id, "", worker, {None: message}, now)


def damaged(rules: Rules, state: State, order_id: str, reward: str | None, path: str, now: float) -> Step:
    """An acknowledged file does not have its digest any more: make it again, at the version it is bound to."""
    record: Record = {"kind": "again", "order": order_id, "reward": reward, "path": path, "time": now}
    step = record_all(state, record)
    leases = {key: holds for key, holds in step.state.leases.items() if key[0] != order_id}
    return step._replace(state=step.state._replace(leases=leases))


# ---- scoring


def lease(rules: Rules, state: State, reward: str, worker: str, now: float) -> Step:
    """Answer: (order id, file of pictures, pictures not to be scored, whether to try them one by one), or None."""
    state = state._replace(asked={**state.asked, (reward, place_of(worker)): now})
    order_id = _given(rules, state, reward, worker, rules.leasable(state, reward), now)
    if order_id is None:
        return Step(state)
    key, work = (order_id, reward), work_of(state, order_id)
    holds = state.leases.get(key, ())
    if not rules.held(holds, worker):
        leases = {**state.leases, key: (*holds, Hold(worker, now))}
        state = state._replace(leases=leases, alone=without(state.alone, worker))
    skip = tuple(trajectory_id for trajectory_id, _ in work.set_aside)
    images = work.rollout.images if work.rollout else None
    return Step(state, (), (order_id, images, skip, state.deaths.get(key, 0) >= ALONE_AFTER))


def scores_wanted(rules: Rules, state: State, reward: str, order_id: str, table_digest: str) -> bool:
    """Whether `add_scores` would count. Asked first, so that only scores that count are written."""
    work = work_of(state, order_id)
    return rules.to_score(state, order_id, reward) and rules.scores_count(work, table_digest)


def add_scores(
    rules: Rules, state: State, reward: str, order_id: str, table_digest: str, file: File, now: float
) -> Step:
    """Scores of all pictures of the table that are not set aside were written. Answer: whether they count."""
    if not scores_wanted(rules, state, reward, order_id, table_digest):
        return Step(state, (), False)
    record = {
        "kind": "scored",
        "order": order_id,
        "reward": reward,
        "table": table_digest,
        "path": file.path,
        "digest": file.digest,
        "time": now,
    }
    step = record_all(state, record)
    key = (order_id, reward)
    left = step.state._replace(leases=without(state.leases, key), deaths=without(state.deaths, key))
    return settled(rules, step._replace(state=left), order_id)._replace(answer=True)


def pictures_failed(
    rules: Rules,
    state: State,
    reward: str,
    order_id: str,
    table_digest: str,
    worker: str,
    reasons: Mapping[int, str],
    now: float,
) -> Step:
    """Pictures raised when tried alone. It counts once for each lease and picture; at the third it is set aside.

    The lease is over: the order is offered again, for the pictures that are left.
    """
    leases, lost = _released(state.leases, worker, (order_id, reward))
    if not lost or not scores_wanted(rules, state, reward, order_id, table_digest):
        return Step(state)
    state = state._replace(leases=leases, alone=without(state.alone, worker))
    return _failed(rules, state, order_id, reward, worker, reasons, now)


def trying_alone(rules: Rules, state: State, worker: str, picture: int | None, now: float) -> Step:
    """A reward actor tries one picture alone: should it die now, that counts against the picture [7]. The time-out of
    its lease begins anew, for each of them may take as long as all in one batch."""
    alone = without(state.alone, worker)
    leases = {
        key: tuple(hold._replace(since=now) if hold.worker == worker else hold for hold in holds)
        for key, holds in state.leases.items()
    }
    return Step(state._replace(alone=alone if picture is None else {**alone, worker: picture}, leases=leases))


# ---- training and evaluations


def settled(rules: Rules, step: Step, order_id: str) -> Step:
    """Freeze and journal the roster of the order's batch if nothing is missing any more [8]."""
    evaluation, batch, _ = parse(order_id)
    state = step.state
    if evaluation or batch in state.rosters or not rules.complete(state, rules.sizes.batch_orders(batch)):
        return step
    orders = rules.sizes.batch_orders(batch)
    aside = {picture for o in orders if o in state.work for picture, _ in state.work[o].set_aside}
    pictures = [p for o in orders for p in rules.sizes.trajectory_ids(o) if p not in aside]
    record: Record = {"kind": "ready", "batch": batch, "roster": rules.roster(state, batch), "pictures": pictures}
    return Step(record_all(state, record).state, (*step.records, record), step.answer)


def reopen(rules: Rules, state: State) -> Step:
    """At the start of an epoch: what is set aside in batches not yet trained is tried again [9]."""
    orders = rules.reopened(state)
    return record_all(state, {"kind": "reopened", "orders": orders}) if orders else Step(state)


def take(rules: Rules, state: State, learner: str, now: float) -> Step:
    """Answer: the batch to train now, or None. The same learner hears the same batch again; another hears None."""
    batch = rules.may_train(state)
    if batch is None or (state.taken is not None and state.taken.worker != learner):
        return Step(state)
    return Step(state._replace(taken=Hold(learner, now)), (), batch)


def trained(rules: Rules, state: State, batch: int, offered: Trained, now: float) -> Step:
    """A batch was trained and its files are written. Answer: the `Trained` that counts, this one or an earlier one.

    Batch -1 with an empty roster registers version 0.
    """
    version, roster = offered.version, offered.roster
    if version.number != batch + 1:
        raise Refused(f"After batch {batch} comes version {batch + 1}, not {version.number}.")
    if batch < state.next_batch:
        return Step(state, (), rules.path_that_counts(state, version.number, offered))
    if not (batch == -1 == state.next_batch or rules.trains(state, batch, roster)):
        raise Refused(f"Batch {batch} with roster {roster} is not what is to be trained now; take the batch anew.")
    step = record_all(state, {"kind": "trained", "batch": batch, **offered._asdict(), "time": now})
    step = step._replace(state=step.state._replace(published=state.published & rules.served(step.state)))
    return _retired(rules, step)._replace(answer=step.state.trained[-1])


def evaluated(rules: Rules, state: State, evaluation: Evaluation, parquet: str, now: float) -> Step:
    """An evaluation is complete and its Parquet file is written."""
    record = {"kind": "evaluated", "evaluation": evaluation, "parquet": parquet, "time": now}
    return _retired(rules, record_all(state, record))


def missed(rules: Rules, state: State, evaluation: Evaluation, why: str, now: float) -> Step:
    """An evaluation that can no longer be served is closed [14]."""
    if evaluation in state.evaluations:
        return Step(state)
    return _retired(rules, record_all(state, {"kind": "missed", "evaluation": evaluation, "why": why, "time": now}))


def _retired(rules: Rules, step: Step) -> Step:
    """Retention: forget orders whose tensors are not needed any more; the caller deletes their files."""
    orders = rules.retired(step.state)
    if not orders:
        return step
    dropped = record_all(step.state, {"kind": "dropped", "orders": orders})
    return Step(dropped.state, step.records + dropped.records, step.answer)


# ---- death and delay


def worker_died(rules: Rules, state: State, worker: str, charged: Charged, now: float) -> Step:
    """Its claims, leases and batch go back. A death is not the work's fault, but for a picture tried alone; five that
    are charged to the same work stop the run (`Rules.stop`) [7]."""
    claims, lost_orders = _released(state.claims, worker)
    leases, lost_leases = _released(state.leases, worker)
    lost = [(order_id, "") for order_id in lost_orders] + lost_leases
    picture = state.alone.get(worker)
    taken = state.taken
    if taken is not None and taken.worker == worker:
        lost.append((f"batch {state.next_batch}", ""))
        taken = None
    deaths = dict(state.deaths)
    if charged == "work" and picture is None:
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
        if charged != "nobody" and picture in rules.sizes.trajectory_ids(order_id):
            reasons = {picture: "the worker died on this picture alone"}
            return _failed(rules, state, order_id, reward, worker, reasons, now)
    return Step(state)


def overdue(rules: Rules, state: State, now: float) -> list[str]:
    """Workers that the fleet kills: they hold a claim for twice its time-out, or a lease or the batch for longer than
    its own [5].

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


# ---- what claims and leases have in common


def _given(rules: Rules, state: State, reward: str, worker: str, orders: Iterable[str], now: float) -> str | None:
    """Of orders that lack a reward's scores ("": a rollout), the one that this worker has already [5], or the first
    that is free for it."""
    held = {o: state.leases.get((o, reward), ()) if reward else state.claims.get(o, ()) for o in orders}
    timeout = rules.lease_timeouts[reward] if reward else rules.claim_timeout_s
    for order_id, holds in held.items():
        if rules.held(holds, worker):
            return order_id
    for order_id, holds in held.items():
        spared = rules.spares(state, work_of(state, order_id), reward, worker, now)
        if rules.offered(holds, timeout, now) and not spared:
            return order_id
    return None


def _released(
    held: Mapping[Key, tuple[Hold, ...]], worker: str, only: Key | None = None
) -> tuple[dict[Key, tuple[Hold, ...]], list[Key]]:
    """What is held without this worker's part (of `only` that work, if given), and what it loses."""
    left: dict[Key, tuple[Hold, ...]] = {}
    lost: list[Key] = []
    for key, holds in held.items():
        others = tuple(hold for hold in holds if hold.worker != worker or only not in (None, key))
        if others:
            left[key] = others
        if len(others) < len(holds):
            lost.append(key)
    return left, lost


def _failed(
    rules: Rules,
    state: State,
    order_id: str,
    reward: str,
    worker: str,
    reasons: Mapping[Any, str],  # by picture; {None: why} of a rollout, whose pictures fail together
    now: float,
) -> Step:
    """Journal a failure; what has failed for the third time is set aside [7]."""
    what = {"reward": reward, "pictures": list(reasons)} if reward else {}
    failed = {
        "kind": "failed",
        "order": order_id,
        **what,
        "worker": worker,
        "reasons": [*reasons.values()],
        "time": now,
    }
    records: list[Record] = [failed]
    failures = dict(work_of(fold(state, failed), order_id).failures)
    for picture, reason in reasons.items():
        if rules.is_set_aside(state, reward, failures[reward, picture], now):
            pictures = list(rules.sizes.trajectory_ids(order_id)) if picture is None else [picture]
            why = f"{reward}: {reason}" if reward else reason
            records.append({"kind": "set_aside", "order": order_id, "pictures": pictures, "reason": why})
    return settled(rules, record_all(state, *records), order_id)
