"""What a model family is to the policy: the door for a new one, built in or the user's own.

docs/extending.md has a whole example.
"""

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from conf.schema import ModelConfig, SamplingConfig
from policy.gaussian import Schedule
from policy.noise_levels import NoiseLevels

Conditioning = tuple[Tensor, ...]  # what the network is told of a prompt, in parts; without a batch axis for one prompt


class Family(Protocol):
    """A text-to-image model on one device. Nothing of it is trained but the LoRA layers that are put into `network`."""

    pipeline: ClassVar[Any]  # diffusers' class of the whole model: reads and writes LoRA files
    prefix: ClassVar[str]  # of the network's weights in a LoRA file: "unet" or "transformer"
    network: Any  # diffusers' model, in model.dtype
    latent_shape: tuple[int, int, int]  # (C, H, W), as noise is drawn
    image_size: tuple[int, int]  # (height, width) in pixels
    unconditional: Conditioning | None  # of no prompt, once `encode` was called; None: nothing to guide away from

    @classmethod
    def check(cls, model: ModelConfig, sampling: SamplingConfig) -> tuple[int, int]:
        """`image_size`, without reading weights. Raises UserError if these settings give no policy."""
        ...

    @classmethod
    def check_prompts(cls, model: ModelConfig, prompts: Sequence[str]) -> list[str]:
        """Sentences about prompts that the model does not read as they are written, such as one that is too long.

        Raises UserError if it reads two of them as one: each would have statistics of its own.
        """
        ...

    @classmethod
    def without_weights(cls, model: ModelConfig) -> nn.Module:
        """The network's layers and their shapes, with any numbers in them: float32, on the CPU."""
        ...

    @classmethod
    def load(cls, model: ModelConfig, device: str, decodes: bool) -> "Family":
        """Reads the network, and what decodes latents if it `decodes` (a sampler does, the learner does not).

        Raises UserError for what the user can mend.
        """
        ...

    def schedule(self, sampling: SamplingConfig) -> Schedule:
        """The Gaussians of the denoising steps. Raises UserError if a step is none."""
        ...

    def noise_levels(self) -> NoiseLevels:
        """Those that the network was trained on: losses on clean pictures draw from them."""
        ...

    def encode(self, prompts: Sequence[str]) -> Iterator[Conditioning]:
        """Of each prompt, whatever the others are. Reads the text encoders, and lets go of them at the end."""
        ...

    def predict(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """The network's output [n,C,H,W] for latents [n,C,H,W], timesteps [n] and parts [n,...] of conditioning."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures [n,3,height,width] in about [-1, 1] of final latents [n,C,H,W]."""
        ...
