"""The policy-gradient losses of DDPO (Black et al. 2023, section 4.3): one record of tensors in, one out.

n is a number of (trajectory, timestep) pairs; each has one action, the next latent. Log-probs are means over the D =
C*H*W dimensions, so `ratio` is the true ratio of densities to the power 1/D; on that scale it is clipped.

Three policies appear: the one that is trained (p), the one that sampled (old, the behaviour policy), and for
`ddpo_decoupled` the one that the batch's first update started from (proximal). With fresh data the last two are one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from conf.schema import Algorithm


@dataclass(frozen=True)
class LossInputs:
    log_probs: Tensor  # [n] of the policy that is trained, differentiable
    old_log_probs: Tensor  # [n] of the policy that sampled, as stored
    proximal_log_probs: Tensor  # [n] of the policy before the batch's first update; only `ddpo_decoupled` looks at it
    advantages: Tensor  # [n] of each pair's trajectory
    clip_range: float


@dataclass(frozen=True)
class LossOutputs:
    loss: Tensor  # [n], differentiable; the gradient of an optimizer step is that of the mean over all its pairs
    log_ratio: Tensor  # [n], log p - log p_old; the true one is D times it
    ratio: Tensor  # [n], what is clipped: p / p_old, or p / p_proximal for ddpo_decoupled
    clipped: Tensor  # bool [n]: the ratio is outside 1 +- clip_range
    approx_kl: Tensor  # [n]: half the squared log of `ratio` (k2 of Schulman 2020), on the scale of the mean over D

    def without_graph(self) -> "LossOutputs":
        """The numbers alone. The loss with its graph would hold all that its forward pass saved for itself."""
        return replace(self, loss=self.loss.detach())


def joined(parts: Sequence[LossOutputs]) -> LossOutputs:
    """One after another; at least one part."""
    return LossOutputs(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(LossOutputs)))


def of_no_pairs(like: Tensor) -> LossOutputs:
    """What a rank without any pairs has, n = 0, in the dtype and on the device of `like`."""
    nothing = like.detach().new_empty(0)
    return LossOutputs(nothing, nothing, nothing, nothing.bool(), nothing)


def ddpo_is(inputs: LossInputs) -> LossOutputs:
    """DDPO_IS, importance-weighted, with PPO's clipping (Schulman et al. 2017, equation 7).

    max(-A ratio, -A clip(ratio, 1 - c, 1 + c)),  ratio = p / p_old
    """
    log_ratio = inputs.log_probs - inputs.old_log_probs
    return LossOutputs(_clipped_loss(inputs, log_ratio), *_measured(inputs, log_ratio))


def ddpo_decoupled(inputs: LossInputs) -> LossOutputs:
    """DDPO_IS for data of several versions ago: PPO's decoupled objective (Hilton et al. 2021, "Batch size-invariance
    for policy optimization", section 3; with a truncated weight in AReaL, Fu et al. 2025).

    w max(-A ratio, -A clip(ratio, 1 - c, 1 + c)),  ratio = p / p_proximal,  w = min(p_proximal / p_old, 1 + c)

    The clip range so bounds what this batch moves, and not how far the policy has moved since the data were sampled:
    plain clipping would leave out most pairs before the first update. The weight, like the ratio, is of means over D,
    and is truncated on that scale; at the true scale's 2 or 5 it would never be.
    """
    weight = (inputs.proximal_log_probs - inputs.old_log_probs).exp().clamp(max=1 + inputs.clip_range)
    log_ratio = inputs.log_probs - inputs.proximal_log_probs
    return LossOutputs(weight * _clipped_loss(inputs, log_ratio), *_measured(inputs, log_ratio))


def ddpo_sf(inputs: LossInputs) -> LossOutputs:
    """DDPO_SF, the score function (REINFORCE), for one optimizer step on fresh samples: -A log p.

    Where the ratio is 1 its gradient is that of `ddpo_is`. Nothing is cut; `clipped` says what would have been.
    """
    log_ratio = inputs.log_probs - inputs.old_log_probs
    return LossOutputs(-inputs.advantages * inputs.log_probs, *_measured(inputs, log_ratio))


def _clipped_loss(inputs: LossInputs, log_ratio: Tensor) -> Tensor:
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - inputs.clip_range, 1 + inputs.clip_range)
    return torch.maximum(-inputs.advantages * ratio, -inputs.advantages * clipped)


@torch.no_grad()
def _measured(inputs: LossInputs, log_clipped_ratio: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    log_ratio = inputs.log_probs.detach() - inputs.old_log_probs
    log_clipped_ratio = log_clipped_ratio.detach()
    ratio = log_clipped_ratio.exp()
    return log_ratio, ratio, (ratio - 1).abs() > inputs.clip_range, 0.5 * log_clipped_ratio**2


Loss = Callable[[LossInputs], LossOutputs]
LOSSES: dict[Algorithm, Loss] = {Algorithm.ddpo_is: ddpo_is, Algorithm.ddpo_sf: ddpo_sf}
