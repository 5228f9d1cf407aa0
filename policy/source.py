"""What can be said about a model before a single weight is read: is it there, is it of a known family, is it safe.

`check_model` is called before a cluster starts, so it imports no torch.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from common.blame import is_the_workers
from common.errors import UserError
from conf.schema import LoraConfig, ModelConfig

# model_index.json's _class_name of the families in policy/, and the files that hold each part's weights
WEIGHT_FILES = {
    "StableDiffusionPipeline": {
        "unet": "diffusion_pytorch_model",
        "vae": "diffusion_pytorch_model",
        "text_encoder": "model",
    }
}
WEIGHT_NAME = "pytorch_lora_weights.safetensors"  # as diffusers names it
T = TypeVar("T")
SHOWN = 200  # characters of a library's reason in a sentence
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def check_model(model: ModelConfig) -> None:
    """Raises UserError if `model.path` is a folder that cannot be loaded, or not a hub repository within reach.

    Of a hub repository only model_index.json is fetched, a few hundred bytes.
    """
    check_lora_is_there(model.lora)
    path = Path(model.path)
    if not path.is_dir():
        if path.exists() or not HUB_ID.fullmatch(model.path):
            raise UserError(
                f"model.path={model.path} is not a folder; give that of a diffusers pipeline, or a hub id such as "
                "stable-diffusion-v1-5/stable-diffusion-v1-5."
            )
        check_family(json.loads(_fetch_index(model).read_text(encoding="utf-8")), model.path)
        return
    index = path / "model_index.json"
    if not index.is_file():
        raise UserError(f"model.path={model.path} has no model_index.json; give the folder of a diffusers pipeline.")
    try:
        index_config = json.loads(index.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{index} is not valid JSON ({error}); download or save the pipeline again.") from error
    if not isinstance(index_config, dict):
        raise UserError(f"{index} holds no settings; download or save the pipeline again.")
    family = check_family(index_config, model.path)
    for part, stem in WEIGHT_FILES[family].items():
        _check_weights(path / part, stem, model)


def check_lora_is_there(lora: LoraConfig) -> None:
    source = lora.init_from
    if source is not None and not Path(source).exists():
        raise no_lora(f"model.lora.init_from={source}")


def no_lora(source: str) -> UserError:
    return UserError(f"There is no LoRA at {source}; give a .safetensors file or a folder with {WEIGHT_NAME}.")


def _fetch_index(model: ModelConfig) -> Path:
    from huggingface_hub import hf_hub_download  # here, because a folder needs none of it
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(hf_hub_download(model.path, "model_index.json", revision=model.revision))
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise UserError(
            f"model.path={model.path} is no folder here, and as a hub id it cannot be read ({reason}); "
            "check the name, the network, or give the folder of a diffusers pipeline."
        ) from error


def check_family(index_config: dict[str, object], path: str) -> str:
    """The pipeline's class name, from its model_index.json. Raises UserError if no family in policy/ knows it."""
    name = str(index_config.get("_class_name"))
    if name not in WEIGHT_FILES:
        raise UserError(
            f"model.path={path} is a {name}, but this policy knows {', '.join(WEIGHT_FILES)}; choose such a model."
        )
    return name


def _check_weights(folder: Path, stem: str, model: ModelConfig) -> None:
    middle = f".{model.variant}" if model.variant else ""
    patterns = (
        f"{stem}{middle}.safetensors",
        f"{stem}{middle}-*-of-*.safetensors",
        f"{stem}-*-of-*{middle}.safetensors",
    )
    if any(any(folder.glob(pattern)) for pattern in patterns):
        if not (folder / "config.json").is_file():  # transformers would take a model's of its own
            raise UserError(
                f"model.path={model.path} has no config.json in {folder.name}/; download or save the pipeline again."
            )
        return
    present = sorted(file.name for file in folder.glob("*") if file.suffix in (".safetensors", ".bin", ".ckpt", ".pt"))
    if not present:
        raise UserError(
            f"model.path={model.path} has no weights in {folder.name}/; download or save the pipeline again."
        )
    if not any(name.endswith(".safetensors") for name in present):
        raise UserError(
            f"model.path={model.path} has only {present[0]} in {folder.name}/, a pickle that can run code when it is "
            "read; convert it with pipe.save_pretrained(folder, safe_serialization=True)."
        )
    variant = f"model.variant={model.variant}" if model.variant else "no model.variant"
    raise UserError(
        f"model.path={model.path} has no {patterns[0]} in {folder.name}/ ({variant}), only {', '.join(present)}; "
        "set model.variant to one that is there."
    )


def read_part(model: ModelConfig, part: str, read: Callable[[], T]) -> T:
    """What `read` gives. What it raises becomes a UserError about that part of the model, as the files are the user's;
    not so for memory or a device that fails."""
    try:
        return read()
    except UserError:
        raise
    except Exception as error:  # of every kind: so do libraries say what is wrong with a file
        if is_the_workers(error):
            raise
        reason = " ".join(str(error).split()).rstrip(".")
        if isinstance(error, LookupError) or not reason:  # of which the text is only what was looked up
            reason = f"{type(error).__name__}: {reason}"
        fix = (
            "download or save the pipeline again"
            if Path(model.path).is_dir()
            else "give the folder of a diffusers pipeline, or a hub id that this machine can reach"
        )
        raise UserError(
            f"model.path={model.path}: {part} cannot be read ({reason[:SHOWN]}{'…' * (len(reason) > SHOWN)}); {fix}."
        ) from error
