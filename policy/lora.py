"""LoRA (Hu et al. 2021) on the denoising network: injection, weights by name, digest, and diffusers' file format.

A LoRA state is a dict from peft's names ("mid_block.attentions.0. ... .to_q.lora_A.weight") to tensors. In the file
of `save_lora_weights` each name has the family's prefix, "unet." or "transformer.".
"""

import hashlib
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from common.errors import UserError
from conf.schema import LoraConfig
from policy.family import Family
from policy.lora_file import Layer
from policy.source import WEIGHT_NAME

ADAPTER = "default"


def inject(network: nn.Module, config: LoraConfig, seed: int, dtype: torch.dtype) -> None:
    """Puts LoRA layers of `dtype` beside the targeted projections of `network`, in place; B is 0, so nothing changes.

    A's entries are uniform on +-1/sqrt(fan_in), as peft draws them, but each matrix from (seed, its name): not from
    the global random state, so every process of a run starts from the same weights.
    """
    check_targets(network, config)
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


@contextmanager
def scaled(network: nn.Module, scale: float) -> Iterator[None]:
    """Inside, the LoRA counts by so much; at 0 `network` is the base model."""
    layers = [module for module in network.modules() if isinstance(module, LoraLayer)]
    before = [dict(layer.scaling) for layer in layers]
    try:
        for layer in layers:
            layer.scaling = {adapter: scale * own for adapter, own in layer.scaling.items()}
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            layer.scaling = own


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


def save(state: Mapping[str, Tensor], folder: Path, config: LoraConfig, family: Family | type[Family]) -> None:
    """Writes `folder`/pytorch_lora_weights.safetensors as diffusers does: every bit of `state`, with rank and alpha.

    `pipe.load_lora_weights(folder)` in any program with diffusers reads it.
    """
    metadata = _peft_config(config).to_dict()
    metadata["target_modules"] = list(config.targets)  # peft has a set, which would be in another order each time
    layers = {name: tensor.detach().cpu() for name, tensor in state.items()}
    parts = {f"{family.prefix}_lora_layers": layers, f"{family.prefix}_lora_adapter_metadata": metadata}
    family.pipeline.save_lora_weights(folder, **parts)


def export(state: Mapping[str, Tensor], folder: Path, config: LoraConfig, family: Family | type[Family]) -> None:
    """Writes the same function as `save`, for other programs: alpha is the rank, and alpha / rank a factor in B.

    Programs that do not read diffusers' metadata take alpha = rank, and would draw another strength without a word. A
    factor that is a power of two changes no bit of the function; any other rounds B's last bit.
    """
    scale = config.alpha / config.rank
    folded = {name: _times(tensor, scale) if ".lora_B." in name else tensor for name, tensor in state.items()}
    save(folded, folder, replace(config, alpha=float(config.rank)), family)


def read_own(folder: Path) -> dict[str, Tensor]:
    """What `save` wrote to `folder`, bit for bit, on the CPU. Raises UserError if it is missing or damaged."""
    file = folder / WEIGHT_NAME
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"The run's own LoRA {file} is missing or damaged ({' '.join(str(error).split())[:150]}); put back a copy "
            f"of {folder}, or start a new run under another run.name."
        ) from error
    return {name.partition(".")[2]: tensor for name, tensor in tensors.items()}  # without the family's prefix


def start_from(layers: Mapping[str, Layer], network: nn.Module, config: LoraConfig, source: str) -> None:
    """Puts a file's LoRA into the injected layers of `network`, as the same function.

    The file's scale goes into B, so that alpha / rank of the run may be another. A layer that the file leaves out, or
    has at a lower rank, keeps its A and a B of 0 there: nothing for now, and trained like the rest.
    Raises UserError, naming the file as `source`, if it has layers or ranks that this run would drop.
    """
    current = parameters(network)
    if beyond := sorted(name for name in layers if f"{name}.lora_A.weight" not in current):
        needed = sorted({*config.targets, *(_ending(name) for name in beyond)})
        raise UserError(
            f"{source} adapts {beyond[0]}, which has no place in model.lora.targets=[{','.join(config.targets)}]; set "
            f"model.lora.targets=[{','.join(needed)}]."
        )
    rank = max(len(layer.a) for layer in layers.values())
    if rank != config.rank:
        raise UserError(f"{source} has rank {rank} but model.lora.rank={config.rank}; set model.lora.rank={rank}.")
    with torch.no_grad():
        for name, layer in layers.items():
            a, b = current[f"{name}.lora_A.weight"], current[f"{name}.lora_B.weight"]
            a[: len(layer.a)] = layer.a.to(a)
            b[:, : len(layer.a)] = _times(layer.b, layer.scale * config.rank / config.alpha).to(b)


def _times(tensor: Tensor, factor: float) -> Tensor:
    """Rounded once."""
    return (tensor.double() * factor).to(tensor.dtype)


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


def check_targets(network: nn.Module, config: LoraConfig) -> None:
    """Raises UserError unless every target names projections of `network`, and nothing else."""
    if config.rank < 1:
        raise UserError(f"model.lora.rank={config.rank} is impossible; choose 1 or more.")
    if not config.targets:
        raise UserError("model.lora.targets is empty, so there is nothing to train; name projections such as to_q.")
    modules = {name: module for name, module in network.named_modules() if not isinstance(module, LoraLayer)}
    fit = sorted({_ending(name) for name, module in modules.items() if isinstance(module, nn.Linear | nn.Conv2d)})
    for target in config.targets:
        named = [name for name in modules if name == target or name.endswith(f".{target}")]
        wrong = [name for name in named if not isinstance(modules[name], nn.Linear | nn.Conv2d)]
        if named and not wrong:
            continue
        reason = (
            f"but no layer of the network ends so; there are {', '.join(fit)}"
            if not named
            else f"but {wrong[0]} is a {type(modules[wrong[0]]).__name__}; LoRA goes beside {', '.join(fit)}"
        )
        raise UserError(f"model.lora.targets names {target[:60]!r}, {reason}.")


def _ending(name: str) -> str:
    """The last part of a module's name, with the part before it if the last is a number: to_q, to_out.0."""
    parts = name.split(".")
    return ".".join(parts[-2:] if parts[-1].isdigit() else parts[-1:])
