"""LoRA (Hu et al. 2021) on the denoising network: injection, weights by name, digest, and diffusers' file format.

A LoRA state is a dict from peft's names ("mid_block.attentions.0. ... .to_q.lora_A.weight") to tensors. In the file
of `save_lora_weights` each name has the prefix "unet.".
"""

import hashlib
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_unet_state_dict_to_peft
from peft import LoraConfig as PeftLoraConfig
from peft import inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from torch import Tensor, nn

from conf.errors import UserError
from conf.schema import LoraConfig

ADAPTER = "default"
WEIGHT_NAME = "pytorch_lora_weights.safetensors"


def inject(network: nn.Module, config: LoraConfig, seed: int, dtype: torch.dtype) -> None:
    """Puts LoRA layers of `dtype` beside the targeted projections of `network`, in place; B is 0, so nothing changes.

    A's entries are uniform on +-1/sqrt(fan_in), as peft draws them, but each matrix from (seed, its name): not from
    the global random state, so every process of a run starts from the same weights.
    """
    _check_targets(network, config)
    with torch.random.fork_rng(devices=[]):  # peft initialises from the global state; ours replaces it below
        inject_adapter_in_model(_peft_config(config), network, ADAPTER)
    for name, parameter in parameters(network).items():
        if "lora_B" in name:
            values = torch.zeros(parameter.shape)
        else:
            bound = 1 / math.sqrt(math.prod(parameter.shape[1:]))
            key = hashlib.sha256(f"{seed}:{name}".encode()).digest()
            generator = torch.Generator("cpu").manual_seed(int.from_bytes(key[:8], "little"))
            values = torch.rand(parameter.shape, generator=generator) * (2 * bound) - bound
        parameter.data = values.to(parameter.device, dtype)


def parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    """LoRA parameters by peft's names without the adapter's name, sorted by name."""
    found = {
        name.replace(f".{ADAPTER}.", "."): parameter
        for name, parameter in network.named_parameters()
        if ".lora_A." in name or ".lora_B." in name
    }
    return dict(sorted(found.items()))


@contextmanager
def disabled(network: nn.Module) -> Iterator[None]:
    """Inside, `network` is the base model."""
    trainable = {name: parameter.requires_grad for name, parameter in parameters(network).items()}
    _enable(network, False)
    try:
        yield
    finally:
        _enable(network, True)
        for name, parameter in parameters(network).items():  # peft's switch sets requires_grad as it likes
            parameter.requires_grad_(trainable[name])


def _enable(network: nn.Module, enabled: bool) -> None:
    for module in network.modules():
        if isinstance(module, LoraLayer):
            module.enable_adapters(enabled)


def digest(state: Mapping[str, Tensor]) -> str:
    """First 16 hex characters of the sha256 of names, shapes and bytes, in the order of names."""
    sha = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        sha.update(f"{name}{tuple(tensor.shape)}".encode())
        sha.update(tensor.numpy().tobytes())
    return sha.hexdigest()[:16]


def save(state: Mapping[str, Tensor], folder: Path, config: LoraConfig) -> None:
    """Writes `folder`/pytorch_lora_weights.safetensors as diffusers does: every bit of `state`, with rank and alpha.

    `pipe.load_lora_weights(folder)` in any program with diffusers reads it.
    """
    StableDiffusionPipeline.save_lora_weights(
        folder,
        unet_lora_layers={name: tensor.detach().cpu() for name, tensor in state.items()},
        unet_lora_adapter_metadata=_peft_config(config).to_dict(),
    )


def load(path: Path, config: LoraConfig) -> dict[str, Tensor]:
    """The LoRA state in a diffusers LoRA file, or in a folder that holds one, on the CPU; halves come as float32.

    Raises UserError if there is none, or if it has another rank, another alpha, or parts that this run would drop.
    """
    file = path / WEIGHT_NAME if path.is_dir() else path
    if not file.is_file():
        raise UserError(
            f"There is no LoRA at model.lora.init_from={path}; give a .safetensors file or a folder with {WEIGHT_NAME}."
        )
    try:
        state, alphas, metadata = StableDiffusionPipeline.lora_state_dict(
            str(file.parent),
            weight_name=file.name,
            use_safetensors=True,
            local_files_only=True,
            return_lora_metadata=True,
        )
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"The LoRA file {file} cannot be read ({error}); give one saved by diffusers.") from error
    if not any(".lora_A." in name for name in state):
        state = convert_unet_state_dict_to_peft(state)  # files of older diffusers, and kohya's
    foreign = sorted(name for name in state if not (name.startswith("unet.") and ".lora_" in name))
    if foreign or not state:
        found = f"holds {foreign[0]!r}" if foreign else "holds nothing"
        raise UserError(
            f"The LoRA file {file} {found}, but a run starts from a LoRA on the UNet alone; give one that is."
        )
    tensors = {
        name.removeprefix("unet."): tensor.to(torch.promote_types(tensor.dtype, torch.float32))
        for name, tensor in state.items()
    }
    ranks = {tensor.shape[0] for name, tensor in tensors.items() if ".lora_A." in name}
    if ranks != {config.rank}:
        raise UserError(
            f"The LoRA file {file} has rank {', '.join(map(str, sorted(ranks)))} but model.lora.rank={config.rank}; "
            "set model.lora.rank to the file's."
        )
    # an alpha for each layer is kohya's way, one for all diffusers'; where none is given diffusers takes the rank
    found_alphas = set((alphas or {}).values()) or {(metadata or {}).get("unet.lora_alpha", config.rank)}
    if found_alphas != {config.alpha}:
        found = ", ".join(f"{alpha:g}" for alpha in sorted(found_alphas))
        raise UserError(
            f"The LoRA file {file} has alpha {found} but model.lora.alpha={config.alpha:g}, which would scale it; "
            "set model.lora.alpha to the file's."
        )
    return tensors


def assign(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copies `state` into the network's LoRA parameters. Raises ValueError unless names and shapes are the same."""
    current = parameters(network)
    missing, unexpected = sorted(current.keys() - state.keys()), sorted(state.keys() - current.keys())
    if missing or unexpected:
        example = f"{missing[0]} is missing" if missing else f"{unexpected[0]} has no place"
        raise ValueError(f"the LoRA has other targets than this model ({example})")
    for name, parameter in current.items():
        if parameter.shape != state[name].shape:
            raise ValueError(f"{name} has shape {tuple(state[name].shape)} where {tuple(parameter.shape)} is expected")
    with torch.no_grad():
        for name, parameter in current.items():
            parameter.copy_(state[name])


def _peft_config(config: LoraConfig) -> PeftLoraConfig:
    return PeftLoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=list(config.targets))


def _check_targets(network: nn.Module, config: LoraConfig) -> None:
    names = [name for name, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    if config.rank < 1:
        raise UserError(f"model.lora.rank={config.rank} is impossible; choose 1 or more.")
    if not config.targets:
        raise UserError("model.lora.targets is empty, so there is nothing to train; name projections such as to_q.")
    for target in config.targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            raise UserError(
                f"model.lora.targets names {target!r}, but no layer of the network ends so; "
                f"there are {', '.join(sorted({_ending(name) for name in names}))}."
            )


def _ending(name: str) -> str:
    """The last part of a module's name, with the part before it if the last is a number: to_q, to_out.0."""
    parts = name.split(".")
    return ".".join(parts[-2:] if parts[-1].isdigit() else parts[-1:])
