"""Transitions of rollouts: publish, claim, add, and what goes wrong with them.

Each is a pure function of (rules, state, the call) and gives a `Step`. Rules 1 to 5 and 7 of docs/buffer.md.
"""

from buffer.errors import Refused
from buffer.orders import Version
from buffer.rules import Rules
from buffer.state import File, Hold, Record, State, Step, place_of, record_all, without, work_of
from buffer.training import settled


def publish(rules: Rules, state: State, version: Version) -> Step:
    """The driver has put the weights of a trained version where samplers find them. Lasts for the epoch."""
    if not (0 <= version.number < len(state.trained)) or state.trained[version.number].version != version:
        raise Refused(f"Version {version.number} ({version.digest}) is not one that the journal has as trained.")
    return Step(state._replace(published=(state.published | {version.number}) & rules.served(state)))


def claim(rules: Rules, state: State, worker: str, now: float) -> Step:
    """Answer: (order id, version), or None if nothing may be claimed now."""
    state = state._replace(asked={**state.asked, ("", place_of(worker)): now})
    claimable = list(rules.claimable(state))
    for order_id in claimable:
        if rules.held(state.claims.get(order_id, ()), worker):
            return Step(state, (), (order_id, work_of(state, order_id).version))
    for order_id in claimable:
        holds = state.claims.get(order_id, ())
        version = rules.binding(state, order_id)
        if version is None or not rules.offered(holds, rules.claim_timeout_s, now):
            continue
        if rules.spares(state, work_of(state, order_id), "", worker, now):
            continue
        record: Record = {"kind": "claimed", "order": order_id, "version": version, "worker": worker, "time": now}
        step = record_all(state, record)
        state = step.state._replace(claims={**state.claims, order_id: (*holds, Hold(worker, now))})
        return Step(state, step.records, (order_id, version))
    return Step(state)


def accepts(rules: Rules, state: State, order_id: str, version: Version) -> bool:
    """Whether `add` would count. Asked first, so that only a table that counts is written."""
    return not rules.closed(state, order_id) and rules.counts(work_of(state, order_id), version)


def add(rules: Rules, state: State, order_id: str, version: Version, file: File, now: float) -> Step:
    """A table was rolled out and written. Answer: whether it counts; a later or unbound one changes nothing.

    Nobody asks who holds the claim: if only holders were heard, an order slower than its time-out would never end.
    """
    if not accepts(rules, state, order_id, version):
        return Step(state, (), False)
    record = {"kind": "rolled_out", "order": order_id, "path": file.path, "digest": file.digest, "time": now}
    step = record_all(state, record)
    deaths = without(step.state.deaths, (order_id, ""))
    step = step._replace(state=step.state._replace(claims=without(state.claims, order_id), deaths=deaths))
    return settled(rules, step, order_id)._replace(answer=True)


def order_failed(rules: Rules, state: State, order_id: str, worker: str, message: str, now: float) -> Step:
    """The rollout raised. It counts against the order, once for each claim; at the third its pictures are set aside."""
    holds = state.claims.get(order_id, ())
    others = tuple(hold for hold in holds if hold.worker != worker)
    if len(others) == len(holds):
        return Step(state)
    record: Record = {"kind": "failed", "order": order_id, "worker": worker, "reasons": [message], "time": now}
    step = record_all(state, record)
    if rules.is_set_aside(state, "", dict(work_of(step.state, order_id).failures)["", None], now):
        pictures = list(rules.sizes.trajectory_ids(order_id))
        aside: Record = {"kind": "set_aside", "order": order_id, "pictures": pictures, "reason": message}
        step = Step(record_all(step.state, aside).state, (record, aside))
    claims = {**state.claims, order_id: others} if others else without(state.claims, order_id)
    return settled(rules, step._replace(state=step.state._replace(claims=claims)), order_id)


def damaged(rules: Rules, state: State, order_id: str, reward: str | None, path: str, now: float) -> Step:
    """An acknowledged file does not have its digest any more: make it again, at the version it is bound to."""
    record: Record = {"kind": "again", "order": order_id, "reward": reward, "path": path, "time": now}
    step = record_all(state, record)
    leases = {key: holds for key, holds in step.state.leases.items() if key[0] != order_id}
    return step._replace(state=step.state._replace(leases=leases))
