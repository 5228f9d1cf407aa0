"""The forward process: how clean latents are noised, and what the network's output says of them.

    x = signal * clean + noise_scale * noise,    clean = from_sample * x + from_output * output

at each level on which the network was trained. Every kind of prediction that this project knows is such a line:

    epsilon (DDPM)   signal = sqrt(alpha_bar), noise_scale = sqrt(1 - alpha_bar), output = noise
    v (progressive distillation)               the same levels, output = signal * noise - noise_scale * clean
    flow matching    signal = 1 - sigma, noise_scale = sigma, output = noise - clean

so losses on clean pictures need not know which of them the model has.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class NoiseLevels:
    """N levels, on the CPU. `level` below is int64 [n], of n latents [n,C,H,W], each at a level of its own."""

    timesteps: Tensor  # [N], as the network is told them
    signal: Tensor  # float64 [N]
    noise_scale: Tensor  # float64 [N], positive
    from_sample: Tensor  # float64 [N]
    from_output: Tensor  # float64 [N], not 0

    def __len__(self) -> int:
        return len(self.timesteps)

    def nearest(self, timesteps: Tensor) -> Tensor:
        """int64 [n]: the levels whose timesteps are nearest to these [n]."""
        return (self.timesteps[None, :].double() - timesteps.cpu()[:, None].double()).abs().argmin(dim=1)

    def noised(self, clean: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        """x, in the dtype of `clean`."""
        return _rows(self.signal, level, clean) * clean + _rows(self.noise_scale, level, clean) * noise

    def clean(self, x: Tensor, output: Tensor, level: Tensor) -> Tensor:
        """The clean latents that `output` predicts at `x`, in its dtype and on its device."""
        return _rows(self.from_sample, level, output) * x.to(output) + _rows(self.from_output, level, output) * output

    def output(self, x: Tensor, clean: Tensor, level: Tensor) -> Tensor:
        """The output that predicts exactly `clean` at `x`, in the dtype of `x`: what a network is trained to give."""
        return (clean - _rows(self.from_sample, level, x) * x) / _rows(self.from_output, level, x)


def _rows(values: Tensor, level: Tensor, like: Tensor) -> Tensor:
    return values[level].to(like)[:, None, None, None]
