"""Transitions of scoring: lease, add_scores, and pictures that fail. Rules 4, 5 and 7 of docs/buffer.md."""

from buffer.rules import ALONE_AFTER, Rules
from buffer.state import File, Hold, Record, State, Step, place_of, record_all, without, work_of
from buffer.training import settled


def lease(rules: Rules, state: State, reward: str, worker: str, now: float) -> Step:
    """Answer: (order id, table file, pictures not to be scored, whether to try them one by one), or None."""
    state = state._replace(asked={**state.asked, (reward, place_of(worker)): now})
    leasable = list(rules.leasable(state, reward))
    for order_id in leasable:
        if rules.held(state.leases.get((order_id, reward), ()), worker):
            return Step(state, (), _leased(state, order_id, reward))
    for order_id in leasable:
        holds = state.leases.get((order_id, reward), ())
        if not rules.offered(holds, rules.lease_timeouts[reward], now):
            continue
        if rules.spares(state, work_of(state, order_id), reward, worker, now):
            continue
        leases = {**state.leases, (order_id, reward): (*holds, Hold(worker, now))}
        state = state._replace(leases=leases, alone=without(state.alone, worker))
        return Step(state, (), _leased(state, order_id, reward))
    return Step(state)


def _leased(state: State, order_id: str, reward: str) -> tuple[str, File | None, tuple[int, ...], bool]:
    work = work_of(state, order_id)
    skip = tuple(trajectory_id for trajectory_id, _ in work.set_aside)
    return order_id, work.table, skip, state.deaths.get((order_id, reward), 0) >= ALONE_AFTER


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
    work = work_of(state, order_id)
    assert work.table is not None
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
    step = step._replace(
        state=step.state._replace(leases=without(state.leases, key), deaths=without(state.deaths, key))
    )
    return settled(rules, step, order_id)._replace(answer=True)


def pictures_failed(
    rules: Rules,
    state: State,
    reward: str,
    order_id: str,
    table_digest: str,
    worker: str,
    reasons: dict[int, str],
    now: float,
) -> Step:
    """Pictures raised when tried alone. It counts once for each lease and picture; at the third it is set aside.

    The lease is over: the order is offered again, for the pictures that are left.
    """
    holds = state.leases.get((order_id, reward), ())
    others = tuple(hold for hold in holds if hold.worker != worker)
    if len(others) == len(holds) or not scores_wanted(rules, state, reward, order_id, table_digest):
        return Step(state)
    record: Record = {
        "kind": "failed",
        "order": order_id,
        "reward": reward,
        "worker": worker,
        "pictures": list(reasons),
        "reasons": list(reasons.values()),
        "time": now,
    }
    step = record_all(state, record)
    failures = dict(work_of(step.state, order_id).failures)
    records = [record]
    for picture, reason in reasons.items():
        if rules.is_set_aside(state, reward, failures[reward, picture], now):
            aside = {"kind": "set_aside", "order": order_id, "pictures": [picture], "reason": f"{reward}: {reason}"}
            records.append(aside)
    key = (order_id, reward)
    leases = {**state.leases, key: others} if others else without(state.leases, key)
    final = record_all(step.state, *records[1:]).state._replace(leases=leases, alone=without(state.alone, worker))
    return settled(rules, Step(final, tuple(records)), order_id)


def trying_alone(state: State, worker: str, picture: int | None, now: float) -> Step:
    """A reward actor tries one picture alone: should it die now, that counts against the picture [7]. The time-out of
    its lease begins anew, for each of them may take as long as all in one batch."""
    alone = without(state.alone, worker)
    leases = {
        key: tuple(hold._replace(since=now) if hold.worker == worker else hold for hold in holds)
        for key, holds in state.leases.items()
    }
    return Step(state._replace(alone=alone if picture is None else {**alone, worker: picture}, leases=leases))
