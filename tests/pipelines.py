"""Small pipelines with random weights, for tests: one as small as can be, one laid out exactly as Stable Diffusion 1.5.

Weights follow from a fixed seed. `sharpen` makes the random UNet's output depend visibly on the prompt.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

# Stable Diffusion's schedule as a DDIM config: std of the last of 50 steps is 0.0206, not 0
SD_DDIM = {
    "_class_name": "DDIMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
# scheduler/scheduler_config.json as Stable Diffusion 1.5 publishes it
SD15_PNDM = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}
WORDS = ["a", "cat", "dog", "horse", "two", "three", "on", "the", "beach", "riding", "bike", "playing", "chess"]


def tiny_pipeline(folder: Path, **scheduler: Any) -> Path:
    """A StableDiffusionPipeline for 64x64 pictures (4x8x8 latents), 0.2 M weights; `scheduler` overrides SD_DDIM."""
    torch.manual_seed(1)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=2,
        norm_num_groups=8,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 16),
        latent_channels=4,
        norm_num_groups=4,
    )
    _save(folder, unet, vae, _text_encoder(layers=1), SD_DDIM | scheduler, variants=(None,))
    return folder


def sd15_layout(folder: Path) -> Path:
    """The folder of Stable Diffusion 1.5 as it is published, block for block, but with few channels and 64x64 pictures.

    PNDM scheduler config, full and fp16 weights side by side, safety checker and feature extractor in the index (and,
    as weights that nobody should read, an empty file).
    """
    torch.manual_seed(2)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 32, 64, 64),
        layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=32,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 16, 32, 32),
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=16,
        sample_size=64,
    )
    _save(folder, unet, vae, _text_encoder(layers=2), SD15_PNDM, variants=("fp16", None))
    for name in ("safety_checker", "feature_extractor"):
        (folder / name).mkdir()
    (folder / "safety_checker" / "model.safetensors").write_bytes(b"")
    (folder / "feature_extractor" / "preprocessor_config.json").write_text(
        '{"feature_extractor_type": "CLIPFeatureExtractor"}'
    )
    return folder


def edit_json(file: Path, **changes: Any) -> None:
    """Overwrites keys of a JSON file; a value of `...` removes the key."""
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}, indent=2))


def _text_encoder(layers: int) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(_vocabulary()),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=layers,
            num_attention_heads=2,
            max_position_embeddings=77,
            projection_dim=32,
            hidden_act="quick_gelu",
            bos_token_id=len(_vocabulary()) - 2,
            eos_token_id=len(_vocabulary()) - 1,
            pad_token_id=len(_vocabulary()) - 1,
        )
    )


def _save(
    folder: Path,
    unet: UNet2DConditionModel,
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    scheduler: dict[str, Any],
    variants: Iterable[str | None],
) -> None:
    _sharpen(unet)
    for variant in variants:
        for name, module in (("unet", unet), ("vae", vae), ("text_encoder", text_encoder)):
            module.half() if variant == "fp16" else module.float()
            module.save_pretrained(folder / name, variant=variant, safe_serialization=True)
        _prefix_text_model(next((folder / "text_encoder").glob(f"model{'.fp16' if variant else ''}.safetensors")))
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler, indent=2))
    _tokenizer(folder / "tokenizer")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.6.0",
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    if "skip_prk_steps" not in scheduler:
        index |= {"feature_extractor": [None, None], "safety_checker": [None, None]}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))


def _sharpen(unet: UNet2DConditionModel) -> None:
    """Scales the random cross attention up, so that prompts, guidance and LoRA matter as they do in a trained model."""
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if ".attn2." in name and name.endswith("weight"):
                parameter.mul_(3.0)


def _prefix_text_model(file: Path) -> None:
    """Puts back what the keys of published files have and transformers 5 leaves out: a prefix, and position_ids."""
    tensors = {f"text_model.{name.removeprefix('text_model.')}": value for name, value in load_file(file).items()}
    tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(tensors, file, metadata={"format": "pt"})


def _vocabulary() -> dict[str, int]:
    """CLIP's byte-level vocabulary in small: single letters, letters at a word's end, the words, start and end."""
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    words = [f"{word}</w>" for word in WORDS if len(word) > 1]
    merged = [word[: i + 1] for word in WORDS for i in range(1, len(word) - 1)]
    tokens = letters + [f"{letter}</w>" for letter in letters] + merged + words
    return {token: i for i, token in enumerate(dict.fromkeys([*tokens, "<|startoftext|>", "<|endoftext|>"]))}


def _tokenizer(folder: Path) -> None:
    """vocab.json and merges.txt with the config files beside them, as Stable Diffusion 1.5 publishes its tokenizer."""
    merges = []
    for word in WORDS:
        for i in range(1, len(word)):
            left, right = word[:i], word[i] + ("</w>" if i == len(word) - 1 else "")
            merges.append(f"{left} {right}")
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(_vocabulary()))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(dict.fromkeys(merges)) + "\n")
    end = {"content": "<|endoftext|>", "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    start = end | {"content": "<|startoftext|>"}
    special = {"bos_token": start, "eos_token": end, "pad_token": "<|endoftext|>", "unk_token": end}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    config = {
        "add_prefix_space": False,
        "bos_token": start | {"__type": "AddedToken"},
        "do_lower_case": True,
        "eos_token": end | {"__type": "AddedToken"},
        "errors": "replace",
        "model_max_length": 77,
        "pad_token": "<|endoftext|>",
        "special_tokens_map_file": "./special_tokens_map.json",
        "tokenizer_class": "CLIPTokenizer",
        "unk_token": end | {"__type": "AddedToken"},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
