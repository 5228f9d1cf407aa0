"""Sampling trajectories from the policy."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from policy import gaussian
from policy.policy import Policy


class NonFinite(ArithmeticError):
    """A trajectory left the finite numbers; one sentence says which, and what to change."""


@dataclass(frozen=True)
class Rollout:
    """B finished trajectories; log_probs[b, i] is that of latents[b, i + 1] given latents[b, i]."""

    latents: np.ndarray  # [B, T+1, C, H, W], x_T first, in sampling.latents_dtype
    timesteps: np.ndarray  # int32 or float32 [B, T], as the network was told them
    log_probs: np.ndarray  # float32 [B, T], mean over C,H,W, of the latents as stored (float64 if model.dtype is);
    # [B, 0] where steps have no noise
    images: np.ndarray  # uint8 [B, height, width, 3]


@torch.no_grad()
def rollout(
    policy: Policy, prompts: Sequence[str], seeds: Sequence[int], noise_seeds: Sequence[int] | None = None
) -> Rollout:
    """One trajectory for each (prompt, seed), with the batch shape that the caller chose.

    noise_seeds: those of the trajectories from whose x_T each starts; None: its own.

    Each trajectory draws from a generator of its own, x_T first and then one noise a step, as a plain diffusers
    pipeline with `generator=torch.Generator().manual_seed(seed)` does; so its numbers do not depend on its neighbours.

    Round first: a latent is rounded to the dtype it is stored in, then its log-prob is taken, and denoising goes on
    from it. Otherwise the learner would score other latents than were acted on, and ratios would not start at 1.

    Raises NonFinite if a trajectory leaves the finite numbers.
    """
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    others = [torch.Generator("cpu").manual_seed(seed) for seed in noise_seeds or seeds]

    def noise(generators: Sequence[torch.Generator] = generators) -> torch.Tensor:
        # float32 also for a network in half precision: torch draws a half as a rounded float
        draws = [torch.randn((1, *policy.latent_shape), generator=g, dtype=policy.arithmetic) for g in generators]
        return torch.cat(draws).to(policy.device)

    def rounded(x: torch.Tensor) -> torch.Tensor:
        return x.to(policy.latents_dtype).to(policy.arithmetic)

    embeds = policy.encode(prompts)
    noise()  # its own x_T is drawn in any case, so that the noise of its steps is the same whatever it starts from
    x = rounded(noise(others))
    latents, log_probs = [x], []
    with policy.scaled():
        for i in range(policy.num_steps):
            mean, std = policy.gaussian(x, torch.full((len(seeds),), i), embeds)
            if policy.schedule.has_noise:
                x = rounded(mean + std * noise())
                log_probs.append(gaussian.log_prob(x, mean, std))
            else:
                x = rounded(mean)
            latents.append(x)
    probabilities = torch.stack(log_probs, dim=1) if log_probs else x.new_empty(len(seeds), 0)
    _refuse_non_finite(torch.cat([probabilities, x.flatten(1)], dim=1), prompts, seeds)
    return Rollout(
        latents=torch.stack(latents, dim=1).to("cpu", policy.latents_dtype).numpy(),
        timesteps=np.tile(_stored(policy.schedule.timesteps), (len(seeds), 1)),
        log_probs=probabilities.cpu().numpy(),
        images=policy.decode(x),
    )


def _stored(timesteps: torch.Tensor) -> np.ndarray:
    return timesteps.to("cpu", torch.float32 if timesteps.is_floating_point() else torch.int32).numpy()


def _refuse_non_finite(numbers: torch.Tensor, prompts: Sequence[str], seeds: Sequence[int]) -> None:
    """numbers: [B, any], not finite as soon as one latent of the trajectory is not."""
    finite = torch.isfinite(numbers).all(dim=1).tolist()
    for good, prompt, seed in zip(finite, prompts, seeds, strict=True):
        if not good:
            raise NonFinite(
                f"the trajectory of prompt {prompt!r} and seed {seed} became infinite or NaN; "
                "lower sampling.guidance or learner.lr, or choose model.dtype=float32"
            )
