"""A LoRA file that somebody gives: read as diffusers reads it, so that a run starts as what diffusers would draw.

Such files come in many layouts, and what scales a layer stands in its rank, in alphas, in metadata, or nowhere. Nothing
of that is read here: diffusers puts the file onto a network without weights, and what it made of each layer is taken.
What would then not be the file's LoRA is refused, in a sentence that says what the file holds.
"""

import json
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import convert_unet_state_dict_to_peft
from diffusers.utils import logging as diffusers_logging
from peft import LoraConfig as PeftLoraConfig
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from torch import Tensor

from common.errors import UserError
from policy.family import Family
from policy.source import WEIGHT_NAME, no_lora

SUFFIX = ".safetensors"
NO_LORA = "scheduler|optimizer|checkpoint"  # in names of files that diffusers passes over
ADAPTER = "file"
PEFT = "base_model.model."  # what peft puts before each name
WEIGHT = re.compile(r"\.lora_[AB]\.weight$")
PICKLES = (".bin", ".pt", ".pth", ".ckpt")

NETWORKS = {"unet": "UNet", "transformer": "transformer"}  # by their prefix, for sentences
# What a tensor's name says of a file that is no plain LoRA.
KINDS = {
    "a LoRA on a text encoder": r"^(text_encoder|lora_te)",
    "a DoRA": r"dora_scale|lora_magnitude_vector",
    "a LoHa": r"hada_",
    "a LoKr": r"lokr_",
    "a GLoRA": r"\.[ab][12]\.weight$",
    "an OFT": r"oft_",
    "an (IA)³": r"ia3_l|\.on_input$",
    "a LoRA with a core matrix": r"lora_mid",
    "a LoRA with biases": r"(lora|lora_B|lora_up|up)\.bias$",
    "a LoRA on embeddings": r"lora_embedding_",
    "a Custom Diffusion": r"custom_diffusion",
    "differences of whole weights": r"\.(diff|diff_b|w_norm|b_norm)$",
    "whole layers beside the LoRA": r"modules_to_save",
}
# Of a LoRA's settings, those that diffusers reads into each layer, and those that change no picture. All others have to
# be as peft has them by default.
READ = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "use_rslora"}
NO_MATTER = {"task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"}
NO_MATTER |= {"inference_mode", "layers_to_transform", "layers_pattern", "exclude_modules", "fan_in_fan_out"}
# What diffusers and peft say a bad file with.
ERRORS = (SafetensorError, OSError, ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError)


@dataclass(frozen=True)
class Layer:
    """The LoRA of one layer: its output is that of the layer plus scale * B(A(x))."""

    a: Tensor  # [rank, in] or [rank, in, k, k], in the network's dtype
    b: Tensor  # [out, rank] or [out, rank, 1, 1]
    scale: float


def read(path: Path, network: Any, source: str, family: Family | type[Family]) -> dict[str, Layer]:
    """The LoRA at `path`, a file or a folder that holds one, by names of the layers of `network`.

    network: the model's architecture with any weights; it is left with the file's LoRA in it, fit for nothing else.
    source: how sentences name the file to who gave it, "model.lora.init_from=my_lora".
    Raises UserError for what cannot be read, or is not a plain LoRA on this network.
    """
    file = _find(path, source)
    try:
        with safe_open(file, framework="pt") as content:
            names = list(content.keys())
    except ERRORS as error:
        raise UserError(f"{source} cannot be read ({_short(error)}); give a .safetensors file of a LoRA.") from error
    if not names:
        raise UserError(f"{source} holds nothing; give a LoRA on the {NETWORKS[family.prefix]}.")
    _refuse_other_kinds(names, source, family.prefix)
    try:
        with _quiet():
            layers = _as_diffusers_does(file, network, source, family)
    except ERRORS as error:
        raise UserError(
            f"{source} cannot be read by diffusers ({_short(error)}); give a LoRA that it loads with this model."
        ) from error
    for name, layer in layers.items():
        if not all(torch.isfinite(tensor).all() for tensor in (layer.a, layer.b * layer.scale)):
            raise UserError(f"{source} holds numbers that are not finite, in {name}; give another LoRA.")
    return layers


def _as_diffusers_does(file: Path, network: Any, source: str, family: Family | type[Family]) -> dict[str, Layer]:
    """`pipe.load_lora_weights`; names without a prefix are read by `pipe.unet.load_lora_adapter(file, prefix=None)`."""
    own, noun = f"{family.prefix}.", NETWORKS[family.prefix]
    state, alphas, metadata = family.pipeline.lora_state_dict(
        str(file.parent),
        weight_name=file.name,
        use_safetensors=True,
        local_files_only=True,
        return_lora_metadata=True,
    )
    prefix = next((start for start in (own, PEFT) if any(name.startswith(start) for name in state)), "")
    if prefix == PEFT:
        metadata = _settings_beside(file, source)
    elif metadata is not None:
        metadata = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    _refuse_strange([name for name in state if not name.startswith(prefix)], source, noun)
    state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    if "lora_A" not in next(iter(state)):
        state = convert_unet_state_dict_to_peft(state)  # files of older diffusers, and kohya's
    _refuse_strange([name for name in state if not WEIGHT.search(name)], source, noun)
    adapted = {name.rpartition(".lora_")[0] for name in state}
    if foreign := sorted(adapted - {name for name, _ in network.named_modules()}):
        raise UserError(
            f"{source} adapts {_cut(foreign[0])}, which the {noun} of model.path does not have; give a LoRA that was "
            "trained on this model."
        )
    if metadata is not None:
        _refuse_unusual_settings(metadata, source)
        metadata = {own + key: value for key, value in metadata.items()}
    network.load_lora_adapter(
        {own + name: tensor for name, tensor in state.items()},
        prefix=family.prefix,
        network_alphas=alphas,
        metadata=metadata,
        adapter_name=ADAPTER,
        low_cpu_mem_usage=True,  # layers are made empty, and are the file's tensors or stay empty
    )
    layers = {
        name: Layer(module.lora_A[ADAPTER].weight.detach(), module.lora_B[ADAPTER].weight.detach(), scale)
        for name, module in network.named_modules()
        if isinstance(module, LoraLayer) and (scale := module.scaling.get(ADAPTER)) is not None
    }
    for name in sorted(layers.keys() | adapted):
        given = {f"{name}.lora_A.weight", f"{name}.lora_B.weight"} <= state.keys()
        if name not in layers or not given or layers[name].a.is_meta or layers[name].b.is_meta:
            raise UserError(f"{source} holds the LoRA of {name} in part only; save it again, or give another.")
    return layers


def _find(path: Path, source: str) -> Path:
    """The file itself; of a folder the one that diffusers would take, if there is no doubt which."""
    if path.is_dir() and not source.endswith("="):  # no path at all would be this folder
        inside = sorted(file for file in path.iterdir() if file.is_file())
        found = [file for file in inside if file.suffix == SUFFIX and not re.search(NO_LORA, file.name)]
        found = [file for file in found if file.name == WEIGHT_NAME] or found
        if len(found) > 1:
            some = ", ".join(file.name for file in found[:3])
            raise UserError(f"{source} is a folder with {len(found)} LoRA files ({_cut(some)}); name one of them.")
        found = found or [file for file in inside if file.suffix in PICKLES][:1]
        if not found:
            raise no_lora(source)
        path = found[0]
    if not path.is_file():
        raise no_lora(source)
    if path.suffix in PICKLES:
        raise UserError(
            f"{source} has {_cut(path.name)}, a pickle that can run code when it is read; load it with diffusers where "
            "you trust it, and save it as .safetensors."
        )
    if path.suffix != SUFFIX:
        raise UserError(f"{source} does not end in {SUFFIX}, by which diffusers knows a LoRA; rename it if it is one.")
    return path


def _settings_beside(file: Path, source: str) -> dict[str, Any]:
    """A LoRA saved by peft itself has its scale in a file beside it."""
    beside = file.with_name("adapter_config.json")
    if not beside.is_file():
        raise UserError(
            f"{source} was saved by peft, which writes a LoRA's scale to {beside.name}, and that is not beside it; "
            "put it there."
        )
    settings: dict[str, Any] = json.loads(beside.read_text(encoding="utf-8"))
    return settings


def _refuse_other_kinds(names: list[str], source: str, own: str) -> None:
    others = {f"a LoRA on a {noun}": rf"^{prefix}\." for prefix, noun in NETWORKS.items() if prefix != own}
    for kind, pattern in (KINDS | others).items():
        if found := sorted(name for name in names if re.search(pattern, name)):
            raise UserError(
                f"{source} holds {kind} ({_cut(found[0])}), but a run starts from a plain LoRA on the {NETWORKS[own]} "
                "alone; give one that is, or leave model.lora.init_from out."
            )


def _refuse_strange(names: list[str], source: str, noun: str) -> None:
    if names:
        raise UserError(
            f"{source} holds {_cut(min(names))!r}, which is no LoRA weight of a {noun} that diffusers knows; give a "
            "LoRA that pipe.load_lora_weights takes whole."
        )


def _refuse_unusual_settings(metadata: dict[str, Any], source: str) -> None:
    usual = PeftLoraConfig().to_dict()
    settings = PeftLoraConfig(**metadata).to_dict()
    for key in sorted(settings.keys() - READ - NO_MATTER):
        value = settings[key]
        if value != usual[key] and not (key == "init_lora_weights" and value in (False, "gaussian")):
            raise UserError(
                f"{source} says of itself {key}={_cut(str(value))}, with which it is more than a plain LoRA or draws "
                "at random; give one without."
            )


@contextmanager
def _quiet() -> Iterator[None]:
    """diffusers and peft tell much on the way; what matters is said in one sentence."""
    before = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        diffusers_logging.set_verbosity(before)


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split()).rstrip(".")
    if isinstance(error, LookupError | AttributeError):  # of which the text is only what was looked up
        text = f"{type(error).__name__}: {text}"
    return _cut(text, 160)


def _cut(text: str, length: int = 100) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
