"""For who watches and who waits: how far orders are, and whom a call waits for that has nothing to hand out.

Pure functions of the state. Whom somebody waits for is true until the state changes, so who accounts for it asks again
at each change. Answers: "rollouts", "scores of <reward>", "the learner", "publication" (the driver has not yet put
trained weights where samplers find them), "the end of the run" (there is nothing left to hand out).
"""

from collections import Counter
from typing import Any

from buffer.rules import Rules
from buffer.state import State, work_of

ROLLOUTS = "rollouts"
LEARNER = "the learner"
PUBLICATION = "publication"
END = "the end of the run"


def progress(rules: Rules, state: State) -> dict[str, Any]:
    """How far the run is: fields of `News`."""
    return {
        "finished": rules.finished(state),
        "batches": rules.batches,
        "trained": max(state.next_batch, 0),
        "training": state.taken is not None,
        "orders": orders_by_state(rules, state),
        "evaluating": orders_of_evaluations(rules, state),
        "set_aside": set_aside(rules, state),
    }


def orders_by_state(rules: Rules, state: State) -> dict[str, int]:
    """Orders of admitted batches that are not trained, by what has become of them; see `News.orders`."""
    orders = Counter(open=0, claimed=0, rolled_out=0, scored=0)
    for batch in range(max(state.next_batch, 0), rules.batches):
        if not rules.admitted(state, batch):
            break
        for order_id in rules.sizes.batch_orders(batch):
            work = work_of(state, order_id)
            if rules.over(state, order_id):
                orders["scored"] += 1
            elif work.rollout is not None:
                orders["rolled_out"] += 1
            else:
                orders["claimed" if order_id in state.claims else "open"] += 1
    return dict(orders)


def orders_of_evaluations(rules: Rules, state: State) -> int:
    """Of open evaluations, orders that are not over."""
    orders = [o for evaluation in rules.open_evaluations(state) for o in rules.sizes.evaluation_orders(evaluation)]
    return sum(not rules.over(state, order_id) for order_id in orders)


def set_aside(rules: Rules, state: State) -> dict[str, int]:
    """Pictures by reason. What is over is in the totals already, though retention may still keep its tensors."""
    aside = Counter(state.set_aside)
    for order_id, work in state.work.items():
        if not rules.closed(state, order_id):
            aside.update(reason for _, reason in work.set_aside)
    return dict(aside)


def sampler_waits_for(rules: Rules, state: State) -> str:
    """Why `claim` has no order: all that are admitted are claimed, and more are admitted with the next version."""
    if state.next_batch < 0:
        return LEARNER
    if max(state.published, default=-1) < state.next_batch:
        return PUBLICATION
    if rules.admitted(state, rules.batches - 1):
        return END
    return _oldest_batch_lacks(rules, state)


def reward_waits_for(rules: Rules, state: State) -> str:
    """Why `lease` has no pictures: some are being rolled out, or the samplers wait themselves."""
    if next(rules.claimable(state), None) is not None:
        return ROLLOUTS
    return sampler_waits_for(rules, state)


def learner_waits_for(rules: Rules, state: State) -> str:
    """Why `take` has no batch."""
    if state.next_batch >= rules.batches:
        return END
    if not rules.admitted(state, state.next_batch):
        return PUBLICATION
    return _oldest_batch_lacks(rules, state)


def _oldest_batch_lacks(rules: Rules, state: State) -> str:
    """Scores, where pictures lie in line for them, for then the reward is what is too slow; else rollouts, else scores
    that are being made, else its training."""
    if state.next_batch in state.rosters:
        return LEARNER
    orders = rules.sizes.batch_orders(state.next_batch)
    lacking = [(o, reward) for reward in rules.rewards for o in orders if rules.to_score(state, o, reward)]
    in_line = [reward for o, reward in lacking if (o, reward) not in state.leases]
    if not in_line and any(rules.to_roll_out(state, o) for o in orders):
        return ROLLOUTS
    missing = Counter(in_line or [reward for _, reward in lacking])
    return f"scores of {missing.most_common(1)[0][0]}" if missing else LEARNER
