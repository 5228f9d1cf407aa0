"""The family of Stable Diffusion 1 and 2: a UNet that predicts epsilon or v, conditioned on CLIP text embeddings.

A family is what `Policy` asks of a model, and nothing else: load its parts, encode one prompt, call the network, decode
latents, and say which Gaussian a step is. See docs/policy.md for how to add one.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors import SafetensorError
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from conf.errors import UserError
from conf.schema import ModelConfig, SamplingConfig
from policy.gaussian import Schedule, ddim_schedule
from policy.source import check_model

logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class StableDiffusion:
    """Frozen parts on one device; only LoRA layers, put into `network` later, are ever trained."""

    network: UNet2DConditionModel  # in the run's model.dtype
    vae: AutoencoderKL  # float32, or float64 like the network: half precision shows in pictures, and can overflow
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    schedule: Schedule

    @classmethod
    def load(cls, model: ModelConfig, sampling: SamplingConfig, device: str) -> "StableDiffusion":
        """Reads unet, vae, text_encoder, tokenizer and scheduler, and never the safety checker. Raises UserError."""
        check_model(model)
        dtype: torch.dtype = getattr(torch, model.dtype)
        place = {"pretrained_model_name_or_path": model.path, "revision": model.revision}
        schedule = _schedule(model, sampling)  # first, because it refuses within milliseconds
        tokenizer = _read(model, "tokenizer", lambda: CLIPTokenizer.from_pretrained(**place, subfolder="tokenizer"))
        if len(tokenizer) < 3:  # transformers makes up an empty one, of two special tokens, where the files are missing
            raise UserError(f"model.path={model.path} has no vocabulary in tokenizer/; download or save it again.")

        def part(kind: Any, name: str, part_dtype: torch.dtype) -> Any:
            def read() -> tuple[Any, dict[str, Any]]:
                return kind.from_pretrained(
                    **place,
                    subfolder=name,
                    variant=model.variant,
                    use_safetensors=True,
                    torch_dtype=part_dtype,
                    output_loading_info=True,
                )

            module, info = _read(model, name, read)
            if info["missing_keys"]:
                raise UserError(
                    f"model.path={model.path} has no weights for {sorted(info['missing_keys'])[0]} in {name}/; "
                    "download or save the pipeline again."
                )
            return module.requires_grad_(False).eval().to(device)

        transformers_logging.disable_progress_bar()
        unet = part(UNet2DConditionModel, "unet", dtype)
        vae = part(AutoencoderKL, "vae", torch.promote_types(dtype, torch.float32))
        text_encoder = part(CLIPTextModel, "text_encoder", dtype)
        _check_unet(unet, vae, model)
        return cls(unet, vae, text_encoder, tokenizer, schedule.to(device))

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the pictures that the network was made for."""
        return self.network.config.in_channels, *_grid(self.network.config)

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return _pixels(self.network.config, self.vae.config)

    @torch.no_grad()
    def encode(self, prompt: str) -> Tensor:
        """What the network is told of `prompt`: the text encoder's last hidden state [L, D], in the network's dtype."""
        length = self.tokenizer.model_max_length
        needed = len(self.tokenizer(prompt).input_ids)
        if needed > length:
            logger.warning("a prompt of %d tokens is cut off after %d: %s", needed, length, prompt)
        tokens = self.tokenizer(prompt, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return self.text_encoder(tokens.input_ids.to(self.text_encoder.device))[0][0]

    def predict(self, latents: Tensor, step_index: Tensor, conditioning: Tensor) -> Tensor:
        """The network's output [n,C,H,W], in its dtype, for latents [n,C,H,W], steps int64 [n], embeddings [n,L,D]."""
        timesteps = self.schedule.timesteps[step_index]
        return self.network(latents.to(self.network.dtype), timesteps, conditioning, return_dict=False)[0]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pictures [n,3,height,width] in about [-1, 1] of latents [n,C,H,W]."""
        return self.vae.decode(latents.to(self.vae.dtype) / self.vae.config.scaling_factor, return_dict=False)[0]


def _schedule(model: ModelConfig, sampling: SamplingConfig) -> Schedule:
    """DDIM with the betas, spacing and offset of the model's own scheduler (Stable Diffusion 1.5 ships PNDM's)."""

    def read() -> dict[str, Any]:
        return DDIMScheduler.load_config(model.path, subfolder="scheduler", revision=model.revision)

    config = _read(model, "scheduler", read)
    name = config.get("_class_name")
    known = {kind.__name__ for kind in DDIMScheduler().compatibles} | {"DDIMScheduler"}
    if name not in known:
        raise UserError(
            f"model.path={model.path} has a {name}, from which no DDIM schedule follows; use a DDIMScheduler."
        )
    expected = {key: value for key, value in config.items() if key in DDIMScheduler().config}  # without PNDM's own

    def convert() -> Schedule:
        return ddim_schedule(DDIMScheduler.from_config(expected), sampling.steps, sampling.eta)

    return _read(model, "scheduler", convert)


def _read(model: ModelConfig, part: str, read: Callable[[], T]) -> T:
    try:
        return read()
    except (OSError, ValueError, NotImplementedError, SafetensorError) as error:  # what diffusers says it with
        reason = " ".join(str(error).split())
        raise UserError(
            f"model.path={model.path}: {part} cannot be read ({reason}); "
            "give the folder of a diffusers pipeline, or a hub id that this machine can reach."
        ) from error


def _check_unet(unet: UNet2DConditionModel, vae: AutoencoderKL, model: ModelConfig) -> None:
    channels, latent = unet.config.in_channels, vae.config.latent_channels
    if unet.config.out_channels == 2 * channels:
        raise UserError(
            f"model.path={model.path} predicts its variance too (out_channels={unet.config.out_channels}), which "
            "DDIM's Gaussian has no place for; choose a model with a fixed variance."
        )
    if not channels == latent == unet.config.out_channels:
        raise UserError(
            f"model.path={model.path} is not a plain text-to-image model: its UNet takes {channels} channels and gives "
            f"{unet.config.out_channels}, the VAE has {latent}; choose one that is not for inpainting or editing."
        )
    if unet.config.time_cond_proj_dim is not None:
        raise UserError(
            f"model.path={model.path} is distilled for few steps (time_cond_proj_dim={unet.config.time_cond_proj_dim}) "
            "and has no DDIM schedule; choose the model it was distilled from."
        )


def check_schedule(model: ModelConfig, sampling: SamplingConfig) -> None:
    """Raises UserError if the model's scheduler and these settings give no policy; reads no weights."""
    _schedule(model, sampling)


def image_size(model: ModelConfig) -> tuple[int, int]:
    """(height, width) in pixels of the pictures that the model was made for; reads no weights. Raises UserError."""

    def config(kind: Any, part: str) -> dict[str, Any]:
        return _read(model, part, lambda: kind.load_config(model.path, subfolder=part, revision=model.revision))

    return _pixels(config(UNet2DConditionModel, "unet"), config(AutoencoderKL, "vae"))


def _grid(unet_config: Mapping[str, Any]) -> tuple[int, int]:
    """(H, W) of the latents."""
    size = unet_config["sample_size"]
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def _pixels(unet_config: Mapping[str, Any], vae_config: Mapping[str, Any]) -> tuple[int, int]:
    factor = 2 ** (len(vae_config["block_out_channels"]) - 1)
    height, width = _grid(unet_config)
    return height * factor, width * factor
