"""The family of Stable Diffusion 1 and 2: a UNet that predicts epsilon or v, conditioned on CLIP text embeddings.

A family is what `Policy` asks of a model, and nothing else: load its parts, encode one prompt, call the network, decode
latents, and say which Gaussian a step is. See docs/policy.md for how to add one.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from packaging.version import Version
from torch import Tensor, nn
from transformers import CLIPTextModel
from transformers.utils import logging as transformers_logging

from common.errors import UserError
from conf.schema import ModelConfig, SamplingConfig
from policy import lora, lora_file
from policy.gaussian import Schedule, ddim_schedule
from policy.source import check_model, read_part
from policy.tokens import Tokens

logger = logging.getLogger(__name__)
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")  # of diffusers' DDIMScheduler


@dataclass(frozen=True)
class StableDiffusion:
    """Frozen parts on one device; only LoRA layers, put into `network` later, are ever trained."""

    network: UNet2DConditionModel  # in the run's model.dtype
    vae: AutoencoderKL  # float32, or float64 like the network: half precision shows in pictures, and can overflow
    text_encoder: CLIPTextModel
    tokens: Tokens
    schedule: Schedule
    grid: tuple[int, int]  # (H, W) of the latents that the network was made for

    @classmethod
    def load(cls, model: ModelConfig, sampling: SamplingConfig, device: str) -> "StableDiffusion":
        """Reads unet, vae, text_encoder, tokenizer and scheduler, and never the safety checker. Raises UserError."""
        check_model(model)
        dtype: torch.dtype = getattr(torch, model.dtype)
        place = {"pretrained_model_name_or_path": model.path, "revision": model.revision}
        schedule = _schedule(model, sampling)  # first, because it refuses within milliseconds
        tokens = Tokens.load(model)

        def part(kind: Any, name: str, part_dtype: torch.dtype, **options: Any) -> Any:
            def read() -> tuple[Any, dict[str, Any]]:
                return kind.from_pretrained(
                    **place,
                    subfolder=name,
                    variant=model.variant,
                    use_safetensors=True,
                    torch_dtype=part_dtype,
                    output_loading_info=True,
                    **options,
                )

            module, info = read_part(model, name, read)
            missing = sorted(info["missing_keys"]) + sorted(key for key, *_ in info["mismatched_keys"])
            if missing:
                raise UserError(
                    f"model.path={model.path} has no weights, or none of its config's shape, for {missing[0]} in "
                    f"{name}/; download or save the pipeline again."
                )
            return module.requires_grad_(False).eval().to(device)

        transformers_logging.disable_progress_bar()
        transformers_logging.set_verbosity_error()  # what it reports of missing weights is refused here in a sentence
        unet = part(UNet2DConditionModel, "unet", dtype)
        vae = part(AutoencoderKL, "vae", torch.promote_types(dtype, torch.float32))
        text_encoder = part(CLIPTextModel, "text_encoder", dtype, ignore_mismatched_sizes=True)
        _check_unet(unet, vae, model)
        return cls(unet, vae, text_encoder, tokens, schedule.to(device), _grid(model, unet.config))

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.network.config.in_channels, *self.grid

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        height, width = self.grid
        return height * _factor(self.vae.config), width * _factor(self.vae.config)

    @torch.no_grad()
    def encode(self, prompt: str) -> Tensor:
        """What the network is told of `prompt`: the text encoder's last hidden state [L, D], in the network's dtype."""
        if (needed := self.tokens.count(prompt)) > self.tokens.length:
            logger.warning("a prompt of %d tokens is cut off after %d: %s", needed, self.tokens.length, prompt)
        tokens = self.tokens.encode(prompt).to(self.text_encoder.device)
        mask = tokens.attention_mask if getattr(self.text_encoder.config, "use_attention_mask", False) else None
        return self.text_encoder(tokens.input_ids, attention_mask=mask)[0][0]

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
    if isinstance(betas, list) and len(betas) != steps:
        raise UserError(
            f"model.path={model.path} has {len(betas)} trained_betas in scheduler/scheduler_config.json, but "
            f'num_train_timesteps={json.dumps(steps)}; set "num_train_timesteps": {len(betas)} there.'
        )

    def convert() -> DDIMScheduler:
        scheduler = DDIMScheduler.from_config(expected)
        scheduler.set_timesteps(2)  # so that a number that is none is seen here
        return scheduler

    return ddim_schedule(read_part(model, "scheduler", convert), sampling.steps, sampling.eta)


def _check_unet(unet: UNet2DConditionModel, vae: AutoencoderKL, model: ModelConfig) -> None:
    channels, latent = unet.config.in_channels, vae.config.latent_channels
    if not isinstance(vae.config.scaling_factor, int | float):
        raise UserError(
            f"model.path={model.path} has scaling_factor={json.dumps(vae.config.scaling_factor)} in vae/config.json; "
            "leave it out for Stable Diffusion's 0.18215, or set the number that the VAE was trained with."
        )
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


def check_policy(model: ModelConfig, sampling: SamplingConfig) -> None:
    """Raises UserError if scheduler, size or LoRA give no policy; reads no weights but those of a LoRA file."""
    check_schedule(model, sampling)
    image_size(model)
    check_lora(model)


def check_lora(model: ModelConfig) -> None:
    """Raises UserError if model.lora does not fit the model's UNet; reads no weights but those of the LoRA file."""
    network = without_weights(_config(model, UNet2DConditionModel, "unet"), torch.float32)
    lora.inject(network, model.lora, 0, torch.float32)
    if model.lora.init_from is not None:
        source = f"model.lora.init_from={model.lora.init_from}"
        layers = lora_file.read(Path(model.lora.init_from), without_weights(network.config, torch.float32), source)
        lora.start_from(layers, network, model.lora, source)


def without_weights(config: Mapping[str, Any], dtype: torch.dtype) -> UNet2DConditionModel:
    """A UNet with memory that nobody wrote to for weights, on the CPU: its layers and their shapes."""
    with torch.device("meta"):
        network = UNet2DConditionModel.from_config(config)
    nn.Module.to(network, dtype)  # diffusers' own warns of what cannot happen without weights
    return network.to_empty(device="cpu")


def image_size(model: ModelConfig) -> tuple[int, int]:
    """(height, width) in pixels of the pictures that the model was made for; reads no weights. Raises UserError."""
    height, width = _grid(model, _config(model, UNet2DConditionModel, "unet"))
    factor = _factor(_config(model, AutoencoderKL, "vae"))
    return height * factor, width * factor


def _config(model: ModelConfig, kind: Any, part: str) -> Mapping[str, Any]:
    """The part's config, with the defaults of its class where it leaves something out."""

    def read() -> Mapping[str, Any]:
        content = kind.load_config(model.path, subfolder=part, revision=model.revision)
        if not isinstance(content, dict):
            raise TypeError("its config.json holds no settings")
        with torch.device("meta"):
            return kind.from_config(content).config

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


def _factor(vae_config: Mapping[str, Any]) -> int:
    """Pixels a latent, along each side."""
    return 2 ** (len(vae_config["block_out_channels"]) - 1)
