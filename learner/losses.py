"""The policy-gradient losses of DDPO (Black et al. 2023, section 4.3): one record of tensors in, one out.

n is a number of (trajectory, timestep) pairs; each has one action, the next latent. Log-probs are means over the D =
C*H*W dimensions, so `ratio` is the true ratio of densities to the power 1/D; on that scale it is clipped.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from conf.schema import Algorithm


@dataclass(frozen=True)
class LossInputs:
    log_probs: Tensor  # [n] of the policy that is trained, differentiable
    old_log_probs: Tensor  # [n] of the policy that sampled, as stored
    advantages: Tensor  # [n] of each pair's trajectory
    clip_range: float


@dataclass(frozen=True)
class LossOutputs:
    loss: Tensor  # [n], differentiable; the gradient of an optimizer step is that of the mean over all its pairs
    log_ratio: Tensor  # [n], log p - log p_old; the true one is D times it
    ratio: Tensor  # [n], its exponential
    clipped: Tensor  # bool [n]: the ratio is outside 1 +- clip_range
    approx_kl: Tensor  # [n]: half the squared log-ratio (k2 of Schulman 2020), on the scale of the mean over D


def ddpo_is(inputs: LossInputs) -> LossOutputs:
    """DDPO_IS, importance-weighted, with PPO's clipping (Schulman et al. 2017, equation 7).

    max(-A ratio, -A clip(ratio, 1 - c, 1 + c))
    """
    log_ratio = inputs.log_probs - inputs.old_log_probs
    ratio = log_ratio.exp()
    low, high = 1 - inputs.clip_range, 1 + inputs.clip_range
    loss = torch.maximum(-inputs.advantages * ratio, -inputs.advantages * ratio.clamp(low, high))
    return LossOutputs(loss, *_measured(log_ratio, inputs.clip_range))


def ddpo_sf(inputs: LossInputs) -> LossOutputs:
    """DDPO_SF, the score function (REINFORCE), for one optimizer step on fresh samples: -A log p.

    Where the ratio is 1 its gradient is that of `ddpo_is`. Nothing is cut; `clipped` says what would have been.
    """
    log_ratio = inputs.log_probs - inputs.old_log_probs
    return LossOutputs(-inputs.advantages * inputs.log_probs, *_measured(log_ratio, inputs.clip_range))


@torch.no_grad()
def _measured(log_ratio: Tensor, clip_range: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    log_ratio = log_ratio.detach()
    ratio = log_ratio.exp()
    return log_ratio, ratio, (ratio - 1).abs() > clip_range, 0.5 * log_ratio**2


Loss = Callable[[LossInputs], LossOutputs]
LOSSES: dict[Algorithm, Loss] = {Algorithm.ddpo_is: ddpo_is, Algorithm.ddpo_sf: ddpo_sf}
