"""The family of Stable Diffusion 1 and 2: a UNet that predicts epsilon or v, conditioned on CLIP text embeddings."""

import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from packaging.version import Version
from torch import Tensor, nn
from transformers import CLIPTextModel
from transformers.utils import logging as transformers_logging

from common.errors import UserError
from conf.schema import ModelConfig, SamplingConfig
from policy.ddim import ddim_schedule, ddpm_noise_levels
from policy.families.clip_tokens import Tokens
from policy.family import Conditioning
from policy.gaussian import Schedule
from policy.noise_levels import NoiseLevels
from policy.source import check_model, read_part

logger = logging.getLogger(__name__)
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")  # of diffusers' DDIMScheduler


@dataclass
class StableDiffusion:
    """See policy/family.py. A prompt's conditioning is one part: embeddings [L, D] in the network's dtype."""

    pipeline: ClassVar[Any] = StableDiffusionPipeline
    prefix: ClassVar[str] = "unet"

    model: ModelConfig
    device: str
    tokens: Tokens
    network: UNet2DConditionModel
    vae: AutoencoderKL | None  # float32, or float64 like the network: half precision shows in pictures, can overflow
    scaling_factor: float  # of the VAE's latents
    latent_shape: tuple[int, int, int]
    image_size: tuple[int, int]
    unconditional: Conditioning | None = None

    @classmethod
    def check(cls, model: ModelConfig, sampling: SamplingConfig) -> tuple[int, int]:
        _schedule(model, sampling)
        return _image_size(model, _config(model, UNet2DConditionModel, "unet"), _config(model, AutoencoderKL, "vae"))

    @classmethod
    def check_prompts(cls, model: ModelConfig, prompts: Sequence[str]) -> list[str]:
        return Tokens.load(model).check(prompts)

    @classmethod
    def without_weights(cls, model: ModelConfig) -> nn.Module:
        with torch.device("meta"):
            network: nn.Module = UNet2DConditionModel.from_config(_config(model, UNet2DConditionModel, "unet"))
        return network.to_empty(device="cpu")

    @classmethod
    def load(cls, model: ModelConfig, device: str, decodes: bool) -> "StableDiffusion":
        """Never reads the safety checker."""
        check_model(model)
        dtype: torch.dtype = getattr(torch, model.dtype)
        vae_config = _config(model, AutoencoderKL, "vae")
        tokens = Tokens.load(model)
        unet = _part(model, UNet2DConditionModel, "unet", dtype, device)
        _check_unet(unet.config, vae_config, model)
        vae = _part(model, AutoencoderKL, "vae", torch.promote_types(dtype, torch.float32), device) if decodes else None
        return cls(
            model=model,
            device=device,
            tokens=tokens,
            network=unet,
            vae=vae,
            scaling_factor=vae_config["scaling_factor"],
            latent_shape=(unet.config.in_channels, *_grid(model, unet.config)),
            image_size=_image_size(model, unet.config, vae_config),
        )

    def schedule(self, sampling: SamplingConfig) -> Schedule:
        return _schedule(self.model, sampling)

    def noise_levels(self) -> NoiseLevels:
        return ddpm_noise_levels(_scheduler(self.model))

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Iterator[Conditioning]:
        """The text encoder's last hidden state. One prompt at a time, so that its last bits hang on no other."""
        encoder = _part(
            self.model, CLIPTextModel, "text_encoder", self.network.dtype, self.device, ignore_mismatched_sizes=True
        )
        masked = getattr(encoder.config, "use_attention_mask", False)

        def encoded(prompt: str) -> Conditioning:
            tokens = self.tokens.encode(prompt).to(self.device)
            return (encoder(tokens.input_ids, attention_mask=tokens.attention_mask if masked else None)[0][0],)

        if self.unconditional is None:
            self.unconditional = encoded("")
        for prompt in prompts:
            if (needed := self.tokens.count(prompt)) > self.tokens.length:
                logger.warning("a prompt of %d tokens is cut off after %d: %s", needed, self.tokens.length, prompt)
            yield encoded(prompt)

    def predict(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        (embeds,) = conditioning
        # The embeddings' dtype is the network's, which diffusers would look for among all modules.
        output: Tensor = self.network(latents.to(embeds.dtype), timesteps, embeds, return_dict=False)[0]
        return output

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        assert self.vae is not None, "this one was loaded without what decodes"
        pictures: Tensor = self.vae.decode(latents.to(self.vae.dtype) / self.scaling_factor, return_dict=False)[0]
        return pictures


def _part(model: ModelConfig, kind: Any, name: str, dtype: torch.dtype, device: str, **options: Any) -> Any:
    """One of the pipeline's models, frozen. Raises UserError if its weights are not all there."""
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()  # what it reports of missing weights is refused here in a sentence

    def read() -> tuple[Any, dict[str, Any]]:
        loaded: tuple[Any, dict[str, Any]] = kind.from_pretrained(
            model.path,
            revision=model.revision,
            subfolder=name,
            variant=model.variant,
            use_safetensors=True,
            torch_dtype=dtype,
            output_loading_info=True,
            **options,
        )
        return loaded

    module, info = read_part(model, name, read)
    missing = sorted(info["missing_keys"]) + sorted(key for key, *_ in info["mismatched_keys"])
    if missing:
        raise UserError(
            f"model.path={model.path} has no weights, or none of its config's shape, for {missing[0]} in "
            f"{name}/; download or save the pipeline again."
        )
    return module.requires_grad_(False).eval().to(device)


def _schedule(model: ModelConfig, sampling: SamplingConfig) -> Schedule:
    return ddim_schedule(_scheduler(model), sampling.steps, sampling.eta)


def _scheduler(model: ModelConfig) -> DDIMScheduler:
    """DDIM with the betas, spacing and offset of the model's own scheduler (Stable Diffusion 1.5 ships PNDM's)."""

    def read() -> dict[str, Any]:
        content = DDIMScheduler.load_config(model.path, subfolder="scheduler", revision=model.revision)
        if not isinstance(content, dict):
            raise TypeError("scheduler_config.json holds no settings")
        return content

    config = read_part(model, "scheduler", read)
    name = config.get("_class_name", "scheduler without _class_name")
    known = {kind.__name__ for kind in DDIMScheduler().compatibles} | {"DDIMScheduler"}
    if name not in known:
        raise UserError(
            f"model.path={model.path} has a {name}, from which no DDIM schedule follows; choose a model with betas, "
            'whose scheduler/scheduler_config.json has "_class_name": "DDIMScheduler", "PNDMScheduler" or the like.'
        )
    defaults = DDIMScheduler().config
    expected = {key: value for key, value in config.items() if key in defaults}  # without PNDM's own
    if (schedule := expected.get("beta_schedule", BETA_SCHEDULES[0])) not in BETA_SCHEDULES:
        raise UserError(
            f"model.path={model.path} has beta_schedule={json.dumps(schedule)} in scheduler/scheduler_config.json, but "
            f"DDIM knows {', '.join(BETA_SCHEDULES)}; choose a model trained on one of them, or write its betas into "
            '"trained_betas" and one of these names.'
        )
    betas, steps = expected.get("trained_betas"), expected.get("num_train_timesteps", defaults["num_train_timesteps"])
    if isinstance(betas, list) and len(betas) < 2:
        raise UserError(
            f"model.path={model.path} has {len(betas)} trained_betas in scheduler/scheduler_config.json; take the line "
            "out, or write one for each timestep of training."
        )
    if isinstance(betas, list) and len(betas) != steps:
        raise UserError(
            f"model.path={model.path} has {len(betas)} trained_betas in scheduler/scheduler_config.json, but "
            f'num_train_timesteps={json.dumps(steps)}; set "num_train_timesteps": {len(betas)} there.'
        )

    def convert() -> DDIMScheduler:
        scheduler = DDIMScheduler.from_config(expected)
        scheduler.set_timesteps(2)  # so that a number that is none is seen here
        return scheduler

    scheduler: DDIMScheduler = read_part(model, "scheduler", convert)
    return scheduler


def _check_unet(unet: Any, vae: Mapping[str, Any], model: ModelConfig) -> None:
    """By the configs of both."""
    channels, latent = unet.in_channels, vae["latent_channels"]
    scale = vae["scaling_factor"]
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale < math.inf:
        raise UserError(
            f"model.path={model.path} has scaling_factor={json.dumps(scale)} in vae/config.json; "
            "leave it out for Stable Diffusion's 0.18215, or set the number that the VAE was trained with."
        )
    if unet.out_channels == 2 * channels:
        raise UserError(
            f"model.path={model.path} predicts its variance too (out_channels={unet.out_channels}), which "
            "DDIM's Gaussian has no place for; choose a model with a fixed variance."
        )
    if not channels == latent == unet.out_channels:
        raise UserError(
            f"model.path={model.path} is not a plain text-to-image model: its UNet takes {channels} channels and gives "
            f"{unet.out_channels}, the VAE has {latent}; choose one that is not for inpainting or editing."
        )
    if unet.time_cond_proj_dim is not None:
        raise UserError(
            f"model.path={model.path} is distilled for few steps (time_cond_proj_dim={unet.time_cond_proj_dim}) "
            "and has no DDIM schedule; choose the model it was distilled from."
        )


def _config(model: ModelConfig, kind: Any, part: str) -> Mapping[str, Any]:
    """The part's config, with the defaults of its class where it leaves something out."""

    def read() -> Mapping[str, Any]:
        content = kind.load_config(model.path, subfolder=part, revision=model.revision)
        if not isinstance(content, dict):
            raise TypeError("its config.json holds no settings")
        with torch.device("meta"):
            config: Mapping[str, Any] = kind.from_config(content).config
        return config

    return read_part(model, part, read)


def _grid(model: ModelConfig, unet_config: Mapping[str, Any]) -> tuple[int, int]:
    """(H, W) of the latents."""
    size = unet_config["sample_size"]
    before_0_9 = Version(str(unet_config.get("_diffusers_version", "1"))) < Version("0.9.0.dev0")
    if before_0_9 and isinstance(size, int) and size < 64:
        size = 64  # as StableDiffusionPipeline, which knows it for a mistake of that time
    sides = (size, size) if isinstance(size, int) else size
    if not (isinstance(sides, list | tuple) and len(sides) == 2 and all(isinstance(n, int) and n > 0 for n in sides)):
        raise UserError(
            f"model.path={model.path} has sample_size={json.dumps(size)} in unet/config.json, so nobody knows how "
            'large its pictures are; set "sample_size" there to the side of the latents that it was trained on, for '
            "example 64 for pictures of 512 pixels."
        )
    height, width = sides
    return height, width


def _image_size(model: ModelConfig, unet: Mapping[str, Any], vae: Mapping[str, Any]) -> tuple[int, int]:
    """(height, width) in pixels of the pictures that the model was made for."""
    height, width = _grid(model, unet)
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    return height * factor, width * factor
