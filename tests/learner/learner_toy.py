"""A policy of one parameter, for closed forms: every step draws x_next from N(theta, std[i]^2), whatever x is."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from learner.batch import Batch
from policy import gaussian
from policy.gaussian import Schedule
from policy.noise_levels import NoiseLevels

SHAPE = (2, 2, 1)  # C, H, W
D = math.prod(SHAPE)


class GaussianToy:
    """`memory`: how many pairs fit into it; more raise what a full GPU raises."""

    def __init__(self, theta: Tensor, stds: list[float], memory: int | None = None) -> None:
        self.theta = nn.Parameter(theta.clone())
        self.stds = torch.tensor(stds, dtype=theta.dtype)
        ones = torch.ones(len(stds), dtype=torch.float64)
        sigma = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)  # of a flow: output = noise - clean
        self.noise_levels = NoiseLevels(1000 * sigma, 1 - sigma, sigma, torch.ones(3).double(), -sigma)
        self.schedule = Schedule(torch.arange(len(stds)), 0 * ones, ones, self.stds.double())
        self.memory = memory
        self.at_base = False
        self.calls: list[int] = []  # pairs in each call

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, ...]:
        return (torch.zeros(len(prompts), 1, 1),)

    def gaussian(
        self, latents: Tensor, step_index: Tensor, conditioning: tuple[Tensor, ...], guidance_gradient: str = "full"
    ) -> tuple[Tensor, Tensor]:
        self.calls.append(len(latents))
        if self.memory is not None and len(latents) > self.memory:
            raise torch.OutOfMemoryError("out of memory")
        theta = torch.zeros_like(self.theta) if self.at_base else self.theta
        return theta.expand(len(latents), *SHAPE), self.stds[step_index][:, None, None, None]

    def log_prob(
        self,
        latents: Tensor,
        next_latents: Tensor,
        step_index: Tensor,
        conditioning: tuple[Tensor, ...],
        guidance_gradient: str = "full",
    ) -> Tensor:
        mean, std = self.gaussian(latents, step_index, conditioning, guidance_gradient)
        return gaussian.log_prob(next_latents.to(mean), mean, std)

    def predict(
        self, x: Tensor, timesteps: Tensor, conditioning: tuple[Tensor, ...], guidance_gradient: str = "full"
    ) -> Tensor:
        theta = torch.zeros_like(self.theta) if self.at_base else self.theta
        return theta.expand(len(x), *SHAPE)

    @contextmanager
    def base(self) -> Iterator[None]:
        self.at_base = True
        yield
        self.at_base = False

    def lora_parameters(self) -> dict[str, nn.Parameter]:
        return {"theta": self.theta}


@torch.no_grad()
def toy_batch(policy: GaussianToy, count: int, number: int = 0, target: Tensor | None = None) -> Batch:
    """`count` trajectories that `policy` acts out; the reward is how near the last latent comes to `target`."""
    generator = torch.Generator().manual_seed(number)
    steps = len(policy.stds)
    noise = torch.randn((count, steps + 1, *SHAPE), generator=generator, dtype=policy.theta.dtype)
    latents = noise.clone()
    latents[:, 1:] = policy.theta + policy.stds[:, None, None, None] * noise[:, 1:]
    rows, index = torch.arange(count).repeat_interleave(steps), torch.arange(steps).repeat(count)
    log_probs = policy.log_prob(latents[rows, index], latents[rows, index + 1], index, policy.encode([""] * len(rows)))
    goal = torch.zeros(SHAPE) if target is None else target
    rewards = -((latents[:, -1] - goal) ** 2).mean(dim=(1, 2, 3))
    return Batch(
        number=number,
        prompts=tuple(f"prompt {row % 3}" for row in range(count)),
        rewards=rewards.numpy().astype(np.float32),
        parts={},
        groups=np.zeros(count, np.int64),
        ages=np.zeros(count, np.int32),
        ages_in_flight=np.zeros(count, np.int32),
        latents=latents.numpy(),
        log_probs=log_probs.reshape(count, steps).numpy(),
    )
