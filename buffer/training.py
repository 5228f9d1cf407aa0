"""Transitions of training and evaluation: ready, take, trained, evaluated, missed.

Rules 2 and 8 to 14 of docs/buffer.md.
"""

from buffer.errors import Refused
from buffer.orders import Version, parse
from buffer.rules import Rules
from buffer.state import Hold, Record, State, Step, Trained, record_all


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
    if state.taken is not None and state.taken.worker != learner:
        return Step(state)
    batch = rules.may_train(state)
    if batch is None:
        return Step(state)
    return Step(state._replace(taken=Hold(learner, now)), (), batch)


def trained(
    rules: Rules,
    state: State,
    batch: int,
    version: Version,
    recovery_point: str,
    parquet: str,
    roster: str,
    now: float,
) -> Step:
    """A batch was trained and its files are written. Answer: the `Trained` that counts, this one or an earlier one.

    Batch -1 with an empty roster registers version 0.
    """
    if version.number != batch + 1:
        raise Refused(f"After batch {batch} comes version {batch + 1}, not {version.number}.")
    offered = Trained(version, recovery_point, parquet, roster)
    if batch < state.next_batch:
        return Step(state, (), rules.path_that_counts(state, version.number, offered))
    if not (batch == -1 == state.next_batch or rules.trains(state, batch, roster)):
        raise Refused(f"Batch {batch} with roster {roster} is not what is to be trained now; take the batch anew.")
    record: Record = {
        "kind": "trained",
        "batch": batch,
        "version": version,
        "recovery_point": recovery_point,
        "parquet": parquet,
        "roster": roster,
        "time": now,
    }
    step = record_all(state, record)
    step = step._replace(state=step.state._replace(published=state.published & rules.served(step.state)))
    return retire(rules, step)._replace(answer=step.state.trained[-1])


def evaluated(rules: Rules, state: State, version: int, parquet: str, now: float) -> Step:
    """The evaluation of a version is complete and its Parquet file is written."""
    step = record_all(state, {"kind": "evaluated", "version": version, "parquet": parquet, "time": now})
    return retire(rules, step)


def missed(rules: Rules, state: State, version: int, why: str, now: float) -> Step:
    """An evaluation that can no longer be served is closed [14]."""
    if version not in rules.open_evaluations(state):
        return Step(state)
    return retire(rules, record_all(state, {"kind": "missed", "version": version, "why": why, "time": now}))


def retire(rules: Rules, step: Step) -> Step:
    """Retention: forget orders whose tensors are not needed any more; the caller deletes their files."""
    orders = rules.retired(step.state)
    if not orders:
        return step
    dropped = record_all(step.state, {"kind": "dropped", "orders": orders})
    return Step(dropped.state, step.records + dropped.records, step.answer)
