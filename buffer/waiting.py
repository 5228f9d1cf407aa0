"""For whom somebody waits: what the oldest unfinished batch lacks, when a call of the buffer has nothing to hand out.

Pure functions of the state. An answer is true until the state changes, so who accounts for waiting asks again at each
change. Answers: "rollouts", "scores of <reward>", "the learner", "publication" (the driver has not yet put trained
weights where samplers find them), "the end of the run" (there is nothing left to hand out).
"""

from collections import Counter

from buffer.rules import Rules
from buffer.state import State

ROLLOUTS = "rollouts"
LEARNER = "the learner"
PUBLICATION = "publication"
END = "the end of the run"


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
