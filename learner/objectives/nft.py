"""DiffusionNFT (Zheng et al. 2025): supervised learning on good pictures, and on bad ones of the policy's opposite.

With r in [0, 1] how good a picture is, and what the networks say of the clean picture, new and old:

    positive = beta * new + (1 - beta) * old        is to give back the good pictures
    negative = (1 + beta) * old - beta * new        is to give back the bad ones
    loss     = (r * error(positive) + (1 - r) * error(negative)) / beta

Old is the policy that samples. It follows the one that is trained slowly, old <- d old + (1 - d) new after each batch,
and ever more slowly: d = min(follow_rise * batch, follow). With d = 0 it is the policy before the batch's first update.
An error is divided by its own mean absolute value, without a
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
    """r = A / (2 * learner.advantage_clip) + 1/2. follow, follow_rise: as in the paper's public code."""

    def __init__(
        self,
        config: LearnerConfig,
        seed: int,
        beta: float = 1.0,
        follow: float = 0.5,
        follow_rise: float = 0.001,
        levels: int = 3,
        passes: int = 1,
    ) -> None:
        super().__init__(config, seed, levels, passes)
        if not beta > 0:
            raise UserError(f"beta={beta} must be above 0.")
        if not 0 <= follow < 1 or not follow_rise >= 0:
            raise UserError(f"follow={follow} must lie in [0, 1) and follow_rise={follow_rise} must not be negative.")
        self.beta, self.follow, self.follow_rise = float(beta), float(follow), float(follow_rise)

    def following(self, number: int) -> float:
        return min(self.follow_rise * number, self.follow)

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
