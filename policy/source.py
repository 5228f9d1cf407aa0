"""What can be said about a model before a single weight is read: is it there, is it of a known family, is it safe.

`check_model` is called before anything heavy is imported, so this file imports no torch.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from common.blame import is_the_workers
from common.doors import Door
from common.errors import UserError
from conf.schema import LoraConfig, ModelConfig

if TYPE_CHECKING:
    from policy.family import Family

MODEL_FILE = "diffusion_pytorch_model"  # as diffusers names a model's weights
# By the _class_name in model_index.json.
FAMILIES = Door(
    built_in={"StableDiffusionPipeline": "policy.families.stable_diffusion:StableDiffusion"},
    example="my_family:MyFamily",
    method="load(model, device, decodes)",
)


@dataclass(frozen=True)
class BuiltIn:
    """What is known of a family in policy/families/ without importing it."""

    weight_files: Mapping[str, str]  # of each part of the pipeline, without suffix
    drawing: str  # a program that draws one of a run's pictures with its LoRA


BUILT_IN = {
    "StableDiffusionPipeline": BuiltIn(
        weight_files={"unet": MODEL_FILE, "vae": MODEL_FILE, "text_encoder": "model"},
        drawing="""import torch
from diffusers import DDIMScheduler, DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained({model.path!r}, torch_dtype=torch.{model.dtype})
pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
pipe.load_lora_weights({lora!r})
generator = torch.Generator().manual_seed({seed})
image = pipe({prompt!r}, num_inference_steps={sampling.steps}, guidance_scale={sampling.guidance:g},
             eta={sampling.eta:g}, generator=generator).images[0]""",
    )
}
WEIGHT_NAME = "pytorch_lora_weights.safetensors"  # as diffusers names it
T = TypeVar("T")
SHOWN = 200  # characters of a library's reason in a sentence
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def check_model(model: ModelConfig) -> None:
    """Raises UserError if `model.path` is a folder that cannot be loaded, or not a hub repository within reach.

    Of a hub repository only model_index.json is fetched, a few hundred bytes. With model.family, a user's own class
    says what its folder has to hold.
    """
    check_lora_is_there(model.lora)
    name = _family_name(model)
    FAMILIES.locate(f"model.family={name}", name)
    if name in BUILT_IN and (path := Path(model.path)).is_dir():
        for part, stem in BUILT_IN[name].weight_files.items():
            _check_weights(path / part, stem, model)


def family_of(model: ModelConfig) -> "type[Family]":
    """The class that knows the model. It imports torch and diffusers. Raises UserError if there is none, or it lacks
    something that policy/family.py lists."""
    from policy.family import Family  # here, for its torch

    name = _family_name(model)
    found: type[Family] = FAMILIES.find(f"model.family={name}", name)
    wanted = ["pipeline", "prefix", *(member for member in vars(Family) if not member.startswith("_"))]
    if missing := [member for member in wanted if not hasattr(found, member)]:
        raise UserError(f"model.family={name} lacks {', '.join(missing)}; policy/family.py says what each is.")
    return found


def _family_name(model: ModelConfig) -> str:
    if model.family is not None:
        return model.family
    name = class_name(model)
    if name not in BUILT_IN:
        raise UserError(
            f"model.path={model.path} is a {name}, but the families here are {', '.join(BUILT_IN)}; choose such a "
            "model, or give a family of your own as model.family=module:Class."
        )
    return name


def class_name(model: ModelConfig) -> str:
    """What model_index.json calls the pipeline. Raises UserError if there is no such file."""
    path = Path(model.path)
    index = path / "model_index.json"
    if not path.is_dir():
        if path.exists() or not HUB_ID.fullmatch(model.path):
            raise UserError(
                f"model.path={model.path} is not a folder; give that of a diffusers pipeline, or a hub id such as "
                "stable-diffusion-v1-5/stable-diffusion-v1-5."
            )
        index = _fetch_index(model)
    elif not index.is_file():
        raise UserError(f"model.path={model.path} has no model_index.json; give the folder of a diffusers pipeline.")
    try:
        settings = json.loads(index.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{index} is not valid JSON ({error}); download or save the pipeline again.") from error
    if not isinstance(settings, dict):
        raise UserError(f"{index} holds no settings; download or save the pipeline again.")
    return str(settings.get("_class_name"))


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
