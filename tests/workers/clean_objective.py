"""An objective of a user's own that needs only the finished pictures' latents."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from conf.schema import LearnerConfig
from learner.batch import Batch
from learner.objectives.objective import Objective, Pairs, StepResult, TrainablePolicy, at


class Regression(Objective):
    """Advantage-weighted regression (Peng et al. 2019) at one noise level: exp(A) |network(noised) - noise|^2."""

    needs = "clean"
    measures = ("error",)

    def __init__(self, config: LearnerConfig, seed: int, timestep: int, signal: float = 0.5) -> None:
        """signal: alpha-bar of the noise level, a share of the variance."""
        super().__init__(config, seed)
        self.timestep, self.signal = timestep, signal

    def draw(self, batch: Batch) -> list[Pairs]:
        order = self.generator(batch, 0).permutation(len(batch))
        shares = np.array_split(order, min(self.config.optimizer_steps, len(batch)))
        return [Pairs(rows, np.zeros_like(rows)) for rows in shares]

    def loss(self, policy: TrainablePolicy, batch: Batch, pairs: Pairs, advantages: Tensor) -> dict[str, Tensor]:
        clean = at(batch.latents, pairs.rows, pairs.steps).float()
        noise = at(self.generator(batch, 2).normal(size=batch.latents[:, 0].shape), pairs.rows).float()
        noised = self.signal**0.5 * clean + (1 - self.signal) ** 0.5 * noise
        conditioning = policy.encode([batch.prompts[row] for row in pairs.rows])
        output = policy.predict(noised, torch.full((len(pairs),), self.timestep), conditioning)
        error = ((output - noise.to(output)) ** 2).mean(dim=(1, 2, 3))
        return {"loss": advantages.to(error).exp() * error, "error": error.detach()}

    def metrics(self, batch: Batch, steps: Sequence[StepResult]) -> dict[str, float]:
        return {"error": float(np.concatenate([step.measured["error"] for step in steps]).mean())}
