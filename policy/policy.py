"""The diffusion model as a policy: samplers and learner hold one each, and call the same function for log-probs."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from common.errors import UserError
from common.precision import exact_float32
from conf.schema import DType, ModelConfig, SamplingConfig
from policy import gaussian, lora, lora_file
from policy.family import Conditioning, Family
from policy.noise_levels import NoiseLevels
from policy.prompt_cache import PromptCache
from policy.source import family_of

DECODED_PIXELS = 2**20  # pictures are decoded by the megapixel, so that the float32 VAE's memory stays bounded


class Policy:
    """p(x_next | x, prompt) of every denoising step, with classifier-free guidance, as a function of LoRA weights.

    Latents may come in any float dtype and from any device; arithmetic outside the network is float32 (float64 if
    model.dtype is).
    """

    def __init__(self, family: Family, model: ModelConfig, sampling: SamplingConfig, device: str) -> None:
        self.family = family
        self.model = model
        self.arithmetic = torch.promote_types(family.network.dtype, torch.float32)
        self.device = device
        self.prompts = PromptCache(lambda prompts: family.encode(prompts))
        self._gradient_scale = 1.0
        self.lora_scale = 1.0  # of what `rollout` draws with
        self._sample_by(sampling)

    @classmethod
    def load(
        cls,
        model: ModelConfig,
        sampling: SamplingConfig,
        seed: int,
        device: str,
        trainable: bool,
        gradient_checkpointing: bool = False,
    ) -> "Policy":
        """Reads the model, adds LoRA: A from `seed`, B zero, or both from model.lora.init_from.

        trainable: LoRA parameters require gradients (the learner); otherwise nothing does, and it decodes (a sampler).
        gradient_checkpointing: recompute the network's blocks in the backward pass instead of keeping activations.
        Raises UserError for everything that the user can mend.
        """
        if device.startswith("cuda"):
            exact_float32()  # whatever the network's dtype: the VAE beside it is float32
        family = family_of(model).load(model, device, decodes=not trainable)
        policy = cls(family, model, sampling, device)
        lora.inject(family.network, model.lora, seed, policy.arithmetic)
        if model.lora.init_from is not None:
            policy.load_lora(Path(model.lora.init_from), f"model.lora.init_from={model.lora.init_from}")
        for parameter in policy.lora_parameters().values():
            parameter.requires_grad_(trainable)
        if gradient_checkpointing:
            family.network.enable_gradient_checkpointing()
        if trainable and family.network.dtype == torch.float16:
            policy._keep_gradients_in_float16_range()
        return policy

    def with_sampling(self, sampling: SamplingConfig, lora_scale: float = 1.0) -> "Policy":
        """The same network, LoRA and prompts, with other steps, another guidance, or a LoRA that counts by so much in
        rollouts. Raises UserError as `load` does."""
        other = copy.copy(self)
        other._sample_by(sampling)
        other.lora_scale = lora_scale
        return other

    def _sample_by(self, sampling: SamplingConfig) -> None:
        if sampling.latents_dtype == DType.bfloat16:
            raise UserError(
                "sampling.latents_dtype=bfloat16 would round latents to 3 digits; choose float32, or float16 to halve "
                "what is stored."
            )
        if sampling.guidance < 1:
            raise UserError(
                f"sampling.guidance={sampling.guidance:g} would guide away from the prompt; choose 1 (none) or more."
            )
        self.guidance = sampling.guidance
        self.schedule = self.family.schedule(sampling).to(self.device)  # the Gaussians of the T steps
        self.latents_dtype: torch.dtype = getattr(torch, sampling.latents_dtype)

    @property
    def num_steps(self) -> int:
        """T."""
        return len(self.schedule)

    @cached_property
    def noise_levels(self) -> NoiseLevels:
        """Of the forward process, whatever the sampling is."""
        return self.family.noise_levels()

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.family.latent_shape

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.family.image_size

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """What the network is told of B prompts: parts [B, ...] on the policy's device."""
        each = self.prompts(prompts)
        return tuple(torch.stack(parts).to(self.device) for parts in zip(*each, strict=True))

    def gaussian(
        self, latents: Tensor, step_index: Tensor, conditioning: Conditioning, guidance_gradient: str = "full"
    ) -> tuple[Tensor, Tensor]:
        """Mean [n,C,H,W] and std [n,1,1,1] of p(x_next | x, prompt), differentiable in the LoRA parameters.

        latents: [n,C,H,W], x of each row; step_index: int64 [n], 0..T-1, each row its own; conditioning: of n prompts.
        guidance_gradient: "conditional" keeps the gradient out of guidance's unconditional half; values are the same.
        """
        x = latents.to(self.device, self.arithmetic)
        step_index = step_index.to(self.device)
        output = self.predict(x, self.schedule.timesteps[step_index], conditioning, guidance_gradient)
        return gaussian.step(self.schedule, x, output, step_index)

    def predict(
        self, x: Tensor, timesteps: Tensor, conditioning: Conditioning, guidance_gradient: str = "full"
    ) -> Tensor:
        """The guided output of the network [n,C,H,W], in the dtype of the policy's arithmetic.

        x: [n,C,H,W]; timesteps: [n], as the network is told them.
        """
        x, timesteps = x.to(self.device, self.arithmetic), timesteps.to(self.device)
        output = self.family.predict(x, timesteps, conditioning).to(self.arithmetic)
        if self.guidance != 1 and self.family.unconditional is not None:
            # Two passes of n rows, not one of 2n: the numbers are then the same whichever half needs a gradient.
            with torch.no_grad() if guidance_gradient == "conditional" else nullcontext():
                of_none = tuple(part.to(x.device).expand(len(x), *part.shape) for part in self.family.unconditional)
                unconditional = self.family.predict(x, timesteps, of_none).to(self.arithmetic)
            output = unconditional + self.guidance * (output - unconditional)
        if self._gradient_scale != 1 and output.requires_grad:
            output.register_hook(lambda gradient: gradient * self._gradient_scale)
        return output

    def log_prob(
        self,
        latents: Tensor,
        next_latents: Tensor,
        step_index: Tensor,
        conditioning: Conditioning,
        guidance_gradient: str = "full",
    ) -> Tensor:
        """log p(next_latents | latents, prompt) [n] as a mean over C,H,W, float32; other arguments as in `gaussian`."""
        mean, std = self.gaussian(latents, step_index, conditioning, guidance_gradient)
        return gaussian.log_prob(next_latents.to(mean), mean, std)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> np.ndarray:
        """Pictures uint8 [B, height, width, 3] of final latents [B,C,H,W], rounded as diffusers' image processor."""
        height, width = self.image_size
        chunks = latents.to(self.device, self.arithmetic).split(max(1, DECODED_PIXELS // (height * width)))
        pictures = torch.cat([self.family.decode(chunk) for chunk in chunks])
        return ((pictures / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()

    @contextmanager
    def base(self) -> Iterator[None]:
        """Inside, the policy is the pretrained model, without LoRA: for the KL to it."""
        with lora.disabled(self.family.network):
            yield

    @contextmanager
    def scaled(self) -> Iterator[None]:
        """Inside, the LoRA counts by `lora_scale`."""
        with lora.scaled(self.family.network, self.lora_scale) if self.lora_scale != 1 else nullcontext():
            yield

    def lora_parameters(self) -> dict[str, nn.Parameter]:
        """What is trained, by name, in the order of names."""
        return lora.parameters(self.family.network)

    def lora_state(self) -> dict[str, Tensor]:
        """Copies of the LoRA weights, on the CPU, in the order of names: float32 (float64 if model.dtype is)."""
        return {name: parameter.detach().to("cpu", copy=True) for name, parameter in self.lora_parameters().items()}

    def load_lora_state(self, state: Mapping[str, Tensor]) -> None:
        """Takes over `state`. Raises ValueError unless it has exactly this policy's names and shapes."""
        lora.assign(self.family.network, state)

    def load_lora(self, path: Path, source: str) -> None:
        """Takes over the LoRA in a file, or in a folder that holds one, as diffusers would draw with it.

        source: how a sentence names it. Raises UserError if it cannot be read, or is not what this run could train on.
        """
        network = self.family.without_weights(self.model).to(self.arithmetic)
        layers = lora_file.read(path, network, source, self.family)
        lora.start_from(layers, self.family.network, self.model.lora, source)

    def save_lora(self, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
        """Writes the LoRA, or another state of it, as diffusers does: every bit, with its rank and alpha."""
        lora.save(self.lora_state() if state is None else state, folder, self.model.lora, self.family)

    def _keep_gradients_in_float16_range(self) -> None:
        """Backward through a float16 network loses gradients below 6e-8, and those of a mean over C*H*W dimensions and
        thousands of pairs are smaller. So they enter the network scaled, by a power of two, and leave it unscaled.

        128 CHW puts the largest at about 1 when 3,200 pairs share an optimizer step; float32 LoRA gradients come out
        as if nothing had happened, unless one passed 65,504 and is infinite, which the learner counts.
        """
        self._gradient_scale = 128.0 * 2.0 ** (int(np.prod(self.latent_shape)) - 1).bit_length()
        for parameter in self.lora_parameters().values():
            parameter.register_hook(lambda gradient: gradient / self._gradient_scale)
