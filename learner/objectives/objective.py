"""What an objective is to the update: the door for a new one, built in or the user's own.

An objective draws pairs, which are what its loss is a mean over, and gives the loss of each. All else is the update's
(learner/update.py): microbatches, ranks, clipping, AdamW, what is not finite, memory that runs out. docs/extending.md
has a whole example.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from conf.schema import LearnerConfig
from learner.batch import Batch
from policy.gaussian import Schedule
from policy.noise_levels import NoiseLevels

STREAM = 2  # of random numbers beside buffer.orders' 0 and 1
Needs = Literal["steps", "clean"]


class TrainablePolicy(Protocol):
    """What objectives ask of a policy; `policy.policy.Policy` has it, and so does a test's one-parameter Gaussian."""

    schedule: Schedule

    @property
    def noise_levels(self) -> NoiseLevels: ...
    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, ...]: ...
    def gaussian(
        self, latents: Tensor, step_index: Tensor, conditioning: tuple[Tensor, ...], guidance_gradient: str = "full"
    ) -> tuple[Tensor, Tensor]: ...
    def log_prob(
        self,
        latents: Tensor,
        next_latents: Tensor,
        step_index: Tensor,
        conditioning: tuple[Tensor, ...],
        guidance_gradient: str = "full",
    ) -> Tensor: ...
    def predict(
        self, x: Tensor, timesteps: Tensor, conditioning: tuple[Tensor, ...], guidance_gradient: str = "full"
    ) -> Tensor: ...
    def base(self) -> Any: ...
    def lora_parameters(self) -> dict[str, nn.Parameter]: ...


@dataclass(frozen=True)
class Pairs:
    """n pairs of a trajectory of the batch and a step: a denoising step, or whatever an objective numbers."""

    rows: np.ndarray  # int64 [n], of the batch
    steps: np.ndarray  # int64 [n], from 0
    before: np.ndarray | None = None  # [n, ...], what `Objective.before` gave

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, part: slice | np.ndarray) -> "Pairs":
        before = None if self.before is None else self.before[part]
        return Pairs(self.rows[part], self.steps[part], before)

    def split(self, size: int) -> Iterator["Pairs"]:
        for start in range(0, len(self), size):
            yield self.take(slice(start, start + size))


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step saw."""

    pairs: Pairs
    taken: bool  # False: loss or gradient was not finite, and the weights are as before
    loss: float
    grad_norm: float  # before clipping
    measured: Mapping[str, np.ndarray]  # [pairs], in the order of `pairs`: what the objective measures


class Objective(ABC):
    """A loss over pairs. Everything drawn at random follows from (seed, batch number), by `generator`."""

    needs: ClassVar[Needs] = "steps"  # what is stored of a trajectory: all latents and log-probs, or the last latent
    takes_stale_data: ClassVar[bool] = True  # data of earlier versions, and a second optimizer step on the same batch
    measures: ClassVar[tuple[str, ...]] = ()  # beside the loss, of each pair
    penalises_kl: ClassVar[bool] = False  # its loss has kl_weight * KL(policy || base model)

    def __init__(self, config: LearnerConfig, seed: int) -> None:
        self.config = config
        self.seed = seed
        self.kl_weight = config.kl_weight  # from batch to batch another where learner.kl_target steers it

    @abstractmethod
    def draw(self, batch: Batch) -> list[Pairs]:
        """The pairs of each of the batch's optimizer steps."""

    def before(self, policy: TrainablePolicy, batch: Batch, pairs: Pairs) -> Tensor | None:
        """[n, ...] of what the loss has to know of the policy that samples, before the batch's first step; None:
        nothing. That is the policy that is trained, unless it is followed slowly (`following`)."""
        return None

    @abstractmethod
    def loss(self, policy: TrainablePolicy, batch: Batch, pairs: Pairs, advantages: Tensor) -> dict[str, Tensor]:
        """ "loss" [n], differentiable in the LoRA weights, and each of `measures` [n] without a graph.

        advantages: [n], of each pair's trajectory, on the CPU in float32. The loss of an optimizer step is the mean
        over its pairs.
        """

    def kl_to_base(self, policy: TrainablePolicy, batch: Batch, pairs: Pairs) -> Tensor | None:
        """KL(policy || base model) at n states of the batch, per dimension; None: not known."""
        return None

    def following(self, number: int) -> float:
        """How much of the weights that sampled batch `number` stays in those that sample after it: 0 is nothing, and
        samplers always have the newest weights; of 1 - d is the trained policy, old <- d old + (1 - d) trained."""
        return 0.0

    def metrics(self, batch: Batch, steps: Sequence[StepResult]) -> dict[str, float]:
        """Of the batch's optimizer steps, for people. A number that is not finite is left out."""
        return {}

    def shares(self, order: np.ndarray) -> list[np.ndarray]:
        """The batch's rows in `order`, dealt out to its optimizer steps; fewer steps where there are fewer rows."""
        return np.array_split(order, min(self.config.optimizer_steps, len(order)))

    def generator(self, batch: Batch, use: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, STREAM, batch.number, use])


def clipped_loss(log_ratio: Tensor, advantages: Tensor, clip_range: float) -> Tensor:
    """max(-A ratio, -A clip(ratio, 1 - c, 1 + c)) [n], PPO's (Schulman et al. 2017, equation 7)."""
    ratio = log_ratio.exp()
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip_range, 1 + clip_range))


State = tuple[Tensor, Tensor, tuple[Tensor, ...]]  # latents, steps and conditioning: where each pair's action is taken


def gaussian_kl_to_base(policy: TrainablePolicy, state: State, mean: Tensor, std: Tensor) -> Tensor:
    """|mean - mean_base|^2 / (2 std^2) by dimension, [n], exactly: both are Gaussians of one std."""
    with torch.no_grad(), policy.base():
        base_mean, _ = policy.gaussian(*state)
    return ((mean - base_mean) ** 2 / (2 * std**2)).mean(dim=(1, 2, 3))


def at(array: np.ndarray, *index: np.ndarray) -> Tensor:
    """Entries of an array as a tensor. Indexing by arrays copies, so a read-only view of Arrow's memory will do."""
    return torch.from_numpy(array[index])
