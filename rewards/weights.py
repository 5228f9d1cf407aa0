"""Weights from a file or the hub, read without running what is in them."""

import pickle
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError
from safetensors.torch import load_file

from common.errors import UserError
from rewards.base import describe


def find(source: str) -> Path:
    """`source` is a file, or a file on the hub as org/repo/file. Raises UserError."""
    if Path(source).is_file():
        return Path(source)
    parts = source.split("/", 2)
    if len(parts) < 3 or source.startswith(("/", ".", "~")):
        raise UserError(f"{source} is no file; give a file, or one on the hub as org/repo/file.safetensors.")
    try:
        return Path(hf_hub_download("/".join(parts[:2]), parts[2]))
    except Exception as error:  # no network, no such repository, no such file, no right to it
        raise UserError(f"{source} is no file here, and the hub does not give it: {describe(error)}.") from error


def read(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a .safetensors file, or of one written by torch.save that holds nothing else. Raises UserError."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} holds more than weights, and code in it would run if it were read; save its tensors as "
            ".safetensors where you trust it."
        ) from error
    except (SafetensorError, OSError, RuntimeError, EOFError) as error:
        raise UserError(f"{path} cannot be read as weights: {describe(error)}.") from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"{path} is no state dict: it has to map names to tensors.")
    return state
