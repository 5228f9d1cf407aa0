"""Losses on clean pictures: pairs (picture, noise level), no path and no log-prob, so any sampler will do.

The learner noises the last latents anew, at levels and with noise that follow from the run's seed, the batch's number
and the pair, and looks at what the network says there. `error` is |output - target|^2 as a mean over C,H,W, where the
target is the output that would give back the picture: the error that the network was trained on, be its output
epsilon, v or a flow's velocity.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from conf.schema import LearnerConfig
from learner.batch import Batch
from learner.objectives.objective import (
    STREAM,
    Objective,
    Pairs,
    StepResult,
    TrainablePolicy,
    at,
    gaussian_kl_to_base,
)

FINENESS = 2**31  # a pair's "step" is its noise level as a share of all, in this many parts
NOISE = 2  # of the uses of a batch's random numbers: 0 draws, 1 is the update's


@dataclass(frozen=True)
class Noised:
    """n pictures with noise."""

    clean: Tensor  # float64 [n,C,H,W], on the CPU
    x: Tensor  # the same shape and place
    level: Tensor  # int64 [n]
    target: Tensor  # [n,C,H,W], in the dtype and on the device of outputs
    output: Tensor  # the same; differentiable in the LoRA weights

    @cached_property
    def error(self) -> Tensor:
        """[n]"""
        return mean_square(self.output - self.target)


class CleanPictures(Objective):
    """A loss of what the network says at noised pictures. A child says which, in `of`.

    levels: how many noise levels are drawn for each picture of an optimizer step. passes: over the batch, each with
    optimizer_steps of its own.
    """

    needs = "clean"
    measures = ("error",)
    penalises_kl = True  # on clean pictures the pull to the base is on outputs: kl_weight * |output - output_base|^2

    def __init__(self, config: LearnerConfig, seed: int, levels: int = 3, passes: int = 1) -> None:
        super().__init__(config, seed)
        for name, value in (("levels", levels), ("passes", passes)):
            if value < 1:
                raise UserError(f"{name}={value} must be at least 1.")
        self.levels, self.passes = levels, passes

    @abstractmethod
    def of(self, policy: TrainablePolicy, batch: Batch, pairs: Pairs, advantages: Tensor, noised: Noised) -> Tensor:
        """The loss [n]."""

    def rows(self, batch: Batch) -> np.ndarray:
        """int64: which of the batch's pictures are trained on."""
        return np.arange(len(batch))

    def draw(self, batch: Batch) -> list[Pairs]:
        generator, rows, shares = self.generator(batch, 0), self.rows(batch), []
        for _ in range(self.passes):
            order = generator.permutation(rows)
            for share in self.shares(order):
                chosen = np.tile(share, self.levels)
                shares.append(Pairs(chosen, generator.integers(FINENESS, size=len(chosen))))
        return shares

    def loss(self, policy: TrainablePolicy, batch: Batch, pairs: Pairs, advantages: Tensor) -> dict[str, Tensor]:
        noised = self.noised(policy, batch, pairs)
        loss = self.of(policy, batch, pairs, advantages.to(noised.output), noised)
        if self.kl_weight:
            with torch.no_grad(), policy.base():
                base = self._output(policy, batch, pairs, noised.x, noised.level)
            loss = loss + self.kl_weight * mean_square(noised.output - base)
        return {"loss": loss, "error": noised.error.detach()}

    def kl_to_base(self, policy: TrainablePolicy, batch: Batch, pairs: Pairs) -> Tensor | None:
        """At the pictures, noised as much as a path is before each of the pairs' denoising steps: where the path itself
        would be if the model were perfect. None where sampling has no noise, and no two paths of one start overlap."""
        if not policy.schedule.has_noise:
            return None
        levels, steps = policy.noise_levels, torch.from_numpy(pairs.steps)
        clean = at(batch.latents[:, -1], pairs.rows).double()
        level = levels.nearest(policy.schedule.timesteps.cpu()[steps])
        x = levels.noised(clean, self._noise(batch, pairs), level)
        state = x, steps, policy.encode([batch.prompts[row] for row in pairs.rows])
        return gaussian_kl_to_base(policy, state, *policy.gaussian(*state))

    def noised(self, policy: TrainablePolicy, batch: Batch, pairs: Pairs) -> Noised:
        """The pairs' pictures at their levels, and the policy's output there."""
        levels = policy.noise_levels
        level = torch.from_numpy(pairs.steps * len(levels) // FINENESS)
        clean = at(batch.latents[:, -1], pairs.rows).double()
        x = levels.noised(clean, self._noise(batch, pairs), level)
        output = self._output(policy, batch, pairs, x, level)
        return Noised(clean, x, level, levels.output(x, clean, level).to(output), output)

    def _output(self, policy: TrainablePolicy, batch: Batch, pairs: Pairs, x: Tensor, level: Tensor) -> Tensor:
        conditioning = policy.encode([batch.prompts[row] for row in pairs.rows])
        timesteps = policy.noise_levels.timesteps[level]
        return policy.predict(x, timesteps, conditioning, self.config.guidance_gradient)

    def _noise(self, batch: Batch, pairs: Pairs) -> Tensor:
        """float64 [n,C,H,W]: each pair's is its own, in whatever microbatch it comes."""
        keys = [[self.seed, STREAM, batch.number, NOISE, *pair] for pair in zip(pairs.rows, pairs.steps, strict=True)]
        shape = batch.latents.shape[2:]
        return torch.from_numpy(np.stack([np.random.default_rng(key).standard_normal(shape) for key in keys]))

    def metrics(self, batch: Batch, steps: Sequence[StepResult]) -> dict[str, float]:
        errors = [step.measured["error"] for step in steps if step.taken]
        return {"denoising/error": float(np.concatenate(errors).mean(dtype=np.float64))} if errors else {}


def mean_square(difference: Tensor) -> Tensor:
    """[n] of [n,C,H,W]."""
    return (difference**2).mean(dim=(1, 2, 3))
