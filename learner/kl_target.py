"""Steering the KL to the base model: the weight of its penalty grows while the KL is above its target, or rises.

A controller on the weight's logarithm with an integral and a proportional part (as Ziegler et al. 2019 have for
language models, "Fine-tuning language models from human preferences", section 2.2, where one part is enough: thousands
of small steps). A batch here moves the policy far; by its integral alone the KL would swing about the target for ever.
"""

import math

INTEGRAL, PROPORTIONAL = 0.1, 1.0  # per batch


def steered(weight: float, kl: float, before: float, target: float) -> float:
    """The weight for the next batch. kl: measured now; before: one batch ago; both in the unit of `target`."""
    error = _error(kl, target)
    return weight * math.exp(INTEGRAL * error + PROPORTIONAL * (error - _error(before, target)))


def _error(kl: float, target: float) -> float:
    return min(kl / target - 1, 1.0)
