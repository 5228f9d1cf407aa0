"""What a display shows of the buffer: plain numbers and strings, computed from the state."""

from collections import Counter
from typing import Any

from buffer.orders import parse
from buffer.rules import Rules
from buffer.state import State, work_of


def status_of(rules: Rules, state: State, now: float) -> dict[str, Any]:
    """Counts of orders by what they wait for (batches admitted and not trained), ages, pictures set aside, epoch."""
    orders: Counter[str] = Counter(open=0, claimed=0, rolled_out=0, scored=0)
    ages = []
    for batch in range(max(state.next_batch, 0), rules.batches):
        if not rules.admitted(state, batch):
            break
        for order_id in rules.sizes.batch_orders(batch):
            work = work_of(state, order_id)
            if rules.over(work):
                orders["scored"] += 1
            elif work.table is not None:
                orders["rolled_out"] += 1
            else:
                orders["claimed" if order_id in state.claims else "open"] += 1
            if work.table is not None and work.version is not None:
                ages.append(batch - work.version.number)
    evaluating = [o for v in rules.open_evaluations(state) for o in rules.sizes.evaluation_orders(v)]
    aside = Counter(state.set_aside_in_trained)
    aside.update(reason for o, work in state.work.items() if _counts_now(state, o) for _, reason in work.set_aside)
    since = [hold.since for holds in (*state.claims.values(), *state.leases.values()) for hold in holds]
    evaluated = [version for version, parquet in state.evaluations.items() if parquet is not None]
    return {
        "epoch": state.epoch,
        "trained_batches": max(state.next_batch, 0),
        "batches": rules.batches,
        "published": max(state.published, default=None),
        "orders_open": orders["open"],
        "orders_claimed": orders["claimed"],
        "orders_rolled_out": orders["rolled_out"],
        "orders_scored": orders["scored"],
        "orders_of_evaluations": sum(not rules.over(work_of(state, order_id)) for order_id in evaluating),
        "batches_ready": len(state.rosters),
        "taken_by": state.taken.worker if state.taken else None,
        "max_age": max(ages, default=0),
        "set_aside": sum(aside.values()),
        "set_aside_by_reason": dict(aside),
        "damaged": state.damaged,
        "oldest_hold_s": now - min(since) if since else 0.0,
        "evaluations_open": rules.open_evaluations(state),
        "evaluations_finished": evaluated,
        "evaluations_missed": [version for version, parquet in state.evaluations.items() if parquet is None],
    }


def _counts_now(state: State, order_id: str) -> bool:
    """Trained batches are in the totals already, though retention may still keep their tensors."""
    evaluation, group, _ = parse(order_id)
    return evaluation or group >= state.next_batch
