"""DiffusionNFT (Zheng et al. 2025): supervised learning on good pictures, and on bad ones of the policy's opposite.

With r in [0, 1] how good a picture is, and what the networks say of the clean picture, new and old:

    positive = beta * new + (1 - beta) * old        is to give back the good pictures
    negative = (1 + beta) * old - beta * new        is to give back the bad ones
    loss     = (r * error(positive) + (1 - r) * error(negative)) / beta

Old is the policy before the batch's first update. An error is divided by its own mean absolute value, without a
gradient through that, so that no noise level is louder than another (as in the paper's public code).
"""

import torch
from torch import Tensor

from common.errors import UserError
from conf.schema import LearnerConfig
from learner.batch import Batch
from learner.objectives.clean import CleanPictures, Noised, mean_square
from learner.objectives.objective import Pairs, TrainablePolicy

SMALLEST_SCALE = 1e-5


class NegativeAware(CleanPictures):
    """r = A / (2 * learner.advantage_clip) + 1/2."""

    def __init__(self, config: LearnerConfig, seed: int, beta: float = 1.0, levels: int = 3, passes: int = 1) -> None:
        super().__init__(config, seed, levels, passes)
        if not beta > 0:
            raise UserError(f"beta={beta} must be above 0.")
        self.beta = float(beta)

    def before(self, policy: TrainablePolicy, batch: Batch, pairs: Pairs) -> Tensor:
        noised = self.noised(policy, batch, pairs)
        return policy.noise_levels.clean(noised.x, noised.output, noised.level)

    def of(self, policy: TrainablePolicy, batch: Batch, pairs: Pairs, advantages: Tensor, noised: Noised) -> Tensor:
        assert pairs.before is not None
        new = policy.noise_levels.clean(noised.x, noised.output, noised.level)
        old, clean = torch.from_numpy(pairs.before).to(new), noised.clean.to(new)
        positive = self.beta * new + (1 - self.beta) * old - clean
        negative = (1 + self.beta) * old - self.beta * new - clean
        good = (advantages / (2 * self.config.advantage_clip) + 0.5).clamp(0, 1)
        return (good * _scaled(positive) + (1 - good) * _scaled(negative)) / self.beta


def _scaled(difference: Tensor) -> Tensor:
    scale = difference.detach().abs().mean(dim=(1, 2, 3)).clamp(min=SMALLEST_SCALE)
    return mean_square(difference) / scale
