"""One denoising step as a Gaussian, in pure functions.

DDPO reads the denoising chain as an MDP (Black et al. 2023, section 4.2): the action of step i is the next latent, and

    p(x_next | x, c) = N(x_next; mean, std^2 I),    mean = sample_scale[i] * x + output_scale[i] * network(x, t_i, c).

Every sampler that this project knows is linear in x and in the network's output, so a schedule is three numbers a
step. They are computed once in float64, and neither the rollout nor the learner knows from which sampler they came.
"""

import math
from dataclasses import dataclass

from torch import Tensor

SMALLEST_STD = 1e-4  # below it float32's rounding of the mean (1e-7) moves the log-prob by more than the clip range


@dataclass(frozen=True)
class Schedule:
    """The Gaussians of T denoising steps; step i goes from x at timesteps[i] to the next latent.

    Example: Stable Diffusion with 50 steps and eta 1 has timesteps 981, 961, ..., 1 and std 0.454, ..., 0.0206.
    """

    timesteps: Tensor  # [T], as the network is told them: int64, or a float dtype
    sample_scale: Tensor  # float64 [T]
    output_scale: Tensor  # float64 [T]
    std: Tensor  # float64 [T], all positive; or all 0, and then no step has a log-prob

    def __len__(self) -> int:
        return len(self.timesteps)

    @property
    def has_noise(self) -> bool:
        return bool(self.std.any())

    def to(self, device: str) -> "Schedule":
        return Schedule(
            *(tensor.to(device) for tensor in (self.timesteps, self.sample_scale, self.output_scale, self.std))
        )


def step(schedule: Schedule, x: Tensor, output: Tensor, step_index: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [n,C,H,W] and std [n,1,1,1] of each row's next latent, in the dtype of `x`.

    x: float32 or float64 [n,C,H,W]; output: the (guided) network's output, same shape and dtype; step_index: int64
    [n], each row at a step of its own; all on the schedule's device.
    """

    def rows(values: Tensor) -> Tensor:
        return values[step_index].to(x.dtype)[:, None, None, None]

    return rows(schedule.sample_scale) * x + rows(schedule.output_scale) * output, rows(schedule.std)


def log_prob(x_next: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Log-density of `x_next` [n,C,H,W] under N(mean, std^2 I): its **mean** over C,H,W, [n], in the dtype of `mean`.

    The mean and not the sum, as in the paper's public code: the clip range of 1e-4 is meant on this scale, and the
    true log-prob is this times C*H*W.
    """
    log_density = -0.5 * ((x_next - mean) / std) ** 2 - std.log() - 0.5 * math.log(2 * math.pi)
    return log_density.mean(dim=(1, 2, 3))
