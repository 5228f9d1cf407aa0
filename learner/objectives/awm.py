"""Advantage-weighted matching (Xue et al. 2025): DDPO_IS with minus the denoising error in the place of log p.

    ratio = exp(error_old - error),    loss = max(-A ratio, -A clip(ratio, 1 - c, 1 + c))

error_old is that of the policy before the batch's first update, at the same level and noise.
"""

import torch
from torch import Tensor

from learner.batch import Batch
from learner.objectives.clean import CleanPictures, Noised
from learner.objectives.objective import Pairs, TrainablePolicy, clipped_loss


class AdvantageWeightedMatching(CleanPictures):
    def before(self, policy: TrainablePolicy, batch: Batch, pairs: Pairs) -> Tensor:
        return self.noised(policy, batch, pairs).error

    def of(self, policy: TrainablePolicy, batch: Batch, pairs: Pairs, advantages: Tensor, noised: Noised) -> Tensor:
        assert pairs.before is not None
        log_ratio = torch.from_numpy(pairs.before).to(noised.error) - noised.error
        return clipped_loss(log_ratio, advantages, self.config.clip_range)
