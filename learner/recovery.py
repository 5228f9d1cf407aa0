"""The recovery point: everything from which the next batch is trained as if nothing had happened.

    <folder>/pytorch_lora_weights.safetensors   as diffusers saves it: pipe.load_lora_weights(folder) reads it
    <folder>/trained.safetensors                the LoRA that is trained, where samplers' follows it slowly (nft)
    <folder>/optimizer.safetensors              AdamW's moments and step count of each LoRA weight, by name
    <folder>/state.json                         version, advantages, counters, KL weight, settings, others' digests

It holds no state of a random generator because there is none: every random number follows from (seed, batch).

Written under another name, flushed to disk, then renamed (rule 10 of docs/buffer.md): a folder of the right name is
complete.
"""

import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from buffer.orders import Version
from common.errors import UserError
from common.files import digest_of, disk_stops_the_run, sealed, sync, unsealed
from policy import lora
from policy.policy import Policy
from policy.source import WEIGHT_NAME

OPTIMIZER, TRAINED, STATE = "optimizer.safetensors", "trained.safetensors", "state.json"


@dataclass(frozen=True)
class RecoveryPoint:
    """Example: RecoveryPoint(Version(12, "9f86d081884c7d65"), lora, None, optimizer, {"a": [-1]}, {}, 0.0, {}, {})"""

    version: Version
    lora: dict[str, Tensor]  # float32, by name: that of `version`
    trained: dict[str, Tensor] | None  # the same of what is trained on; None where it is `lora`
    optimizer: dict[str, Tensor]  # "<name>.exp_avg", "<name>.exp_avg_sq", "<name>.step"; empty before the first step
    advantage: dict[str, Any]  # remembered rewards by prompt, or whatever it keeps
    counters: dict[str, int]
    kl_weight: float  # for the next batch
    settings: dict[str, Any]  # what the weights are of; a learner with others does not go on from them
    metrics: dict[str, float]  # of the batch that led here: kept with it, so that no death loses or doubles a row


def write(folder: Path, point: RecoveryPoint, policy: Policy) -> None:
    """Writes `point` to `folder`; `policy` has its LoRA weights. FileExistsError if there is a folder of that name.

    A full disk raises RunStopped and leaves nothing behind.
    """
    if folder.exists():
        raise FileExistsError(f"the recovery point {folder} is there already, and none is ever overwritten")
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.tmp")
    with disk_stops_the_run(folder):
        try:
            temporary.mkdir(parents=True)
            with operating_system_errors():
                policy.save_lora(temporary, point.lora)
                save_file(point.optimizer, temporary / OPTIMIZER)
                if point.trained is not None:
                    save_file(point.trained, temporary / TRAINED)
            files = [WEIGHT_NAME, OPTIMIZER, *([] if point.trained is None else [TRAINED])]
            body = {
                "version": point.version,
                "advantage": point.advantage,
                "counters": point.counters,
                "kl_weight": point.kl_weight,
                "settings": point.settings,
                "metrics": point.metrics,
                "files": {name: digest_of(temporary / name) for name in files},
            }
            (temporary / STATE).write_bytes(sealed(body))
            for file in (*files, STATE):
                sync(temporary / file)
            sync(temporary)
            temporary.rename(folder)  # fails if somebody else was faster: a folder with files is never replaced
            sync(folder.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def read(folder: Path, version: Version) -> RecoveryPoint:
    """The recovery point of `version` in `folder`, every byte checked. Raises UserError naming the file that is not as
    it was written, or is another version's."""
    body = _read_state(folder, version)
    for name, digest in body["files"].items():
        if not (folder / name).is_file():
            raise _damaged(folder / name, "is missing")
        if digest_of(folder / name) != digest:
            raise _damaged(folder / name, "is not as it was written (truncated or changed)")
    return RecoveryPoint(
        version=version,
        lora=read_lora(folder, version),
        trained=load_file(folder / TRAINED) if TRAINED in body["files"] else None,
        optimizer=load_file(folder / OPTIMIZER),
        advantage=body["advantage"],
        counters=body["counters"],
        kl_weight=body["kl_weight"],
        settings=body["settings"],
        metrics=body["metrics"],
    )


def read_lora(folder: Path, version: Version) -> dict[str, Tensor]:
    """The weights of `version`, by name. Raises UserError if those in `folder` are others, readable as they may be."""
    state = lora.read_own(folder)
    if (found := lora.digest(state)) != version.digest:
        raise _damaged(folder / WEIGHT_NAME, f"holds other weights ({found}) than those of {_named(version)}")
    return state


def read_metrics(folder: Path, version: Version) -> dict[str, float]:
    """The metrics of the batch that led to `version`. Raises UserError as `read` does."""
    metrics: dict[str, float] = _read_state(folder, version)["metrics"]
    return metrics


def _read_state(folder: Path, version: Version) -> dict[str, Any]:
    file = folder / STATE
    if not file.is_file():
        raise _damaged(file, "is missing")
    body: dict[str, Any] | None = unsealed(file.read_bytes())
    if body is None:
        raise _damaged(file, "is not as it was written (truncated or changed)")
    if (found := Version(*body["version"])) != version:
        raise _damaged(file, f"is of {_named(found)}, not of {_named(version)}")
    return body


def _named(version: Version) -> str:
    return f"version {version.number} ({version.digest})"


@contextmanager
def operating_system_errors() -> Iterator[None]:
    """safetensors tells of a full disk by an exception of its own, with the error's number in the text."""
    try:
        yield
    except SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1]))) from error


def _damaged(file: Path, how: str) -> UserError:
    return UserError(
        f"The recovery point's file {file} {how}; put back a copy of {file.parent}, or start a new run under another "
        "run.name."
    )
