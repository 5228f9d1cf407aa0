"""Reward-weighted regression, the baseline of DDPO's paper (Black et al. 2023, section 4.1; Lee et al. 2023): the
model is trained on its own pictures as on any others, each with a weight that grows with its reward.

    rwr          w = n softmax(temperature * reward), as in the paper's public code (where the temperature multiplies)
    rwr_sparse   w = 1 for the best tenth, 0 for the others
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from conf.schema import LearnerConfig
from learner.batch import Batch
from learner.metrics import effective_sample_size
from learner.objectives.clean import CleanPictures, Noised
from learner.objectives.objective import Pairs, StepResult, TrainablePolicy


class RewardWeighted(CleanPictures):
    """w |output - target|^2. within_prompt: the softmax is over the batch's pictures of one prompt, as the paper has it
    for the aesthetic reward; else over all of them."""

    def __init__(
        self,
        config: LearnerConfig,
        seed: int,
        temperature: float = 0.2,
        within_prompt: bool = False,
        levels: int = 3,
        passes: int = 1,
    ) -> None:
        super().__init__(config, seed, levels, passes)
        _all_pictures(config)
        if not temperature > 0:
            raise UserError(f"temperature={temperature} must be above 0, or better pictures would weigh less.")
        self.temperature, self.within_prompt = float(temperature), within_prompt

    def weights(self, batch: Batch) -> np.ndarray:
        """float64 [n], of mean 1 (within each prompt, too, if the softmax is)."""
        weights: np.ndarray = np.exp(self._log_weights(batch))
        return weights

    def _log_weights(self, batch: Batch) -> np.ndarray:
        prompts = np.array(batch.prompts if self.within_prompt else [""] * len(batch))
        log_weights = np.empty(len(batch))
        for prompt in np.unique(prompts):
            alike = prompts == prompt
            logits = self.temperature * batch.rewards[alike].astype(np.float64)
            logits -= logits.max()
            log_weights[alike] = logits - np.log(np.exp(logits).mean())
        return log_weights

    def of(self, policy: TrainablePolicy, batch: Batch, pairs: Pairs, advantages: Tensor, noised: Noised) -> Tensor:
        return torch.from_numpy(self.weights(batch)[pairs.rows]).to(noised.error) * noised.error

    def metrics(self, batch: Batch, steps: Sequence[StepResult]) -> dict[str, float]:
        return super().metrics(batch, steps) | {"ess/pictures": effective_sample_size(self._log_weights(batch))}


class RewardWeightedSparse(CleanPictures):
    """|output - target|^2 of the best `share` of the batch's pictures, at least one."""

    def __init__(self, config: LearnerConfig, seed: int, share: float = 0.1, levels: int = 3, passes: int = 1) -> None:
        super().__init__(config, seed, levels, passes)
        _all_pictures(config)
        if not 0 < share <= 1:
            raise UserError(f"share={share} must be above 0 and at most 1.")
        self.share = share

    def rows(self, batch: Batch) -> np.ndarray:
        best_first = np.argsort(-batch.rewards, kind="stable")
        return np.sort(best_first[: max(1, round(self.share * len(batch)))])

    def of(self, policy: TrainablePolicy, batch: Batch, pairs: Pairs, advantages: Tensor, noised: Noised) -> Tensor:
        return noised.error


def _all_pictures(config: LearnerConfig) -> None:
    """Raises UserError where only those with large advantages are kept: the worst would be among them."""
    if config.train_share < 1:
        raise UserError(
            f"learner.train_share={config.train_share:g} keeps the best and the worst pictures of a batch, and "
            f"{config.objective} weighs them by itself: set learner.train_share=1"
        )
