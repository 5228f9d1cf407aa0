"""A run folder's own configuration: saved once, compared at every later start, and held by one driver at a time.

runs/<name>/config.yaml    the resolved settings; `python launch.py runs/<name>/config.yaml` goes on with the run
runs/<name>/prompts.txt    the prompts as they were resolved, one a line: a file or a set may change afterwards
runs/.<name>.lock          held (flock) while a driver works on the run; freed by the kernel however the driver ends
"""

import dataclasses
import fcntl
import itertools
import json
import os
import re
import socket
from datetime import datetime
from enum import Enum
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from common.errors import UserError, quoted, shown
from common.files import write_atomically
from common.version import HEADING, VERSION, goes_on, written_by
from conf.load import from_file
from conf.places import by_name, portable
from conf.schema import Config
from conf.settings import flatten, may_change

MOST_SHOWN = 4  # differences in a sentence

VERSION_RECORD = re.compile(rb'{"kind": "(trained|restored)"')  # as buffer/journal.py writes them

# What a start leaves in a new run folder that ended before config.yaml was there.
UNFINISHED = ("prompts.txt", ".prompts.txt.partial", ".config.yaml.partial")


def save_config(run_dir: Path, config: Config, prompts: list[str]) -> None:
    """Writes the resolved settings and prompts into the run folder; config.yaml, the last, is there whole or not."""
    run_dir.mkdir(parents=True, exist_ok=True)
    write_atomically(run_dir / "prompts.txt", "".join(f"{prompt}\n" for prompt in prompts))
    settings = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    write_atomically(run_dir / "config.yaml", HEADING + OmegaConf.to_yaml(portable(settings)))


def check_resume(run_dir: Path, config: Config, prompts: list[str]) -> None:
    """Raises UserError if `run_dir` holds a run that other settings or prompts began. Changes nothing."""
    if run_dir.is_symlink() and not run_dir.exists():
        raise UserError(
            f"{shown(run_dir)} is a link to {shown(run_dir.readlink())}, which is not there: mount its disk"
        )
    if not (run_dir / "config.yaml").exists():
        foreign = next((p for p in run_dir.iterdir() if p.name not in UNFINISHED), None) if run_dir.is_dir() else None
        if foreign is not None or (run_dir.exists() and not run_dir.is_dir()):
            raise UserError(f"{shown(run_dir)} exists and is not a run (no config.yaml in it): choose another run.name")
        return
    if any((run_dir / "checkpoints").glob("v*")) or _has_a_version(run_dir):
        check_same(run_dir, config, prompts)
    # Otherwise it ended before version 0, say of a wrong model.lora.targets, and nothing was made with its settings.


def _has_a_version(run_dir: Path) -> bool:
    """By its journal: somebody may have removed checkpoints/, or not mounted it."""
    return any(VERSION_RECORD.search(file.read_bytes()) for file in (run_dir / "journal").glob("*.jsonl"))


def check_same(run_dir: Path, config: Config, prompts: list[str]) -> None:
    """Raises UserError if the settings or prompts saved in `run_dir` are others than these, or another
    version's."""
    saved_config, saved_prompts = run_dir / "config.yaml", run_dir / "prompts.txt"
    if not goes_on(written := written_by(saved_config)):
        raise UserError(
            f"{shown(run_dir)} was written by {written}, and this is version {VERSION}, which keeps other files: go on "
            "with it by that version, or choose another run.name"
        )
    saved = from_file(saved_config)
    differences = changed_settings(saved, config)
    if not saved_prompts.is_file():
        raise UserError(f"{shown(run_dir)} has lost its prompts.txt: put it back, or choose another run.name")
    try:
        old_prompts = saved_prompts.read_text(encoding="utf-8").split("\n")[:-1]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{shown(saved_prompts)} cannot be read ({error}): put it back, or choose another run.name"
        ) from error
    if old_prompts != prompts:
        pairs = enumerate(itertools.zip_longest(old_prompts, prompts), start=1)
        number, (old, new) = next((n, pair) for n, pair in pairs if pair[0] != pair[1])
        differences.append(f"prompt {number}: {_prompt_shown(old)} -> {_prompt_shown(new)}")
    if differences:
        more = [f"{len(differences) - MOST_SHOWN} more"] if len(differences) > MOST_SHOWN else []
        raise UserError(
            f"{shown(run_dir)} was begun with other settings ({'; '.join(differences[:MOST_SHOWN] + more)}): "
            "take them back to go on with it, or choose another run.name"
        )
    if config.run.batches < saved.run.batches:
        raise UserError(
            f"run.batches={config.run.batches} is less than the {saved.run.batches} that {shown(run_dir)} was begun "
            "with: it may only be raised"
        )


def changed_settings(saved: Config, new: Config) -> list[str]:
    """`key: old -> new` for every setting that differs and must not."""
    old, now = (
        flatten(
            dataclasses.asdict(one)
            | {"rewards": {n: dataclasses.asdict(r) if n in other.rewards else r.path for n, r in one.rewards.items()}}
        )
        for one, other in ((saved, new), (new, saved))
    )
    pairs = {key: (old.get(key, "absent"), now.get(key, "absent")) for key in {**old, **now} if not may_change(key)}
    return [
        f"{shown(key, 60)}: {_shown(portable(a))} -> {_shown(portable(b))}"
        for key, (a, b) in pairs.items()
        if by_name(a) != by_name(b)
    ]


class RunLock:
    """`with RunLock(run_dir):` one driver at a time, a UserError naming the other one otherwise.

    The file lies beside the run folder, so that a refused start leaves the folder as it was. It is a courtesy for a
    clear message on one machine or a file system with working locks; the data are kept safe by the buffer's epochs.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.path = run_dir.parent / f".{run_dir.name}.lock"

    def __enter__(self) -> "RunLock":
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = self.path.open("a+", encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"run.dir={shown(self.path.parent)} cannot be written to ({error.strerror}): choose another run.dir"
            ) from error
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.file.close()
            if not isinstance(error, BlockingIOError):
                raise UserError(
                    f"run.dir={shown(self.path.parent)} is on a file system without locks ({error.strerror}): choose "
                    "another run.dir"
                ) from error
            raise UserError(
                f"{shown(self.run_dir)} is in use by another driver ({self._holder()}): "
                "wait for it, stop it, or choose another run.name"
            ) from None
        self.file.seek(0)
        self.file.truncate()
        started = datetime.now().astimezone().isoformat(timespec="seconds")
        json.dump({"host": socket.gethostname(), "pid": os.getpid(), "since": started}, self.file)
        self.file.flush()
        return self

    def __exit__(self, *exception: object) -> None:
        # The file stays: whoever removed it could remove it under a driver that has just opened it.
        self.file.close()

    def is_held(self) -> bool:
        """Whether a driver works on the run now."""
        try:
            with self.path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        return False

    def _holder(self) -> str:
        try:
            holder = json.loads(self.path.read_text(encoding="utf-8"))
            return f"host {holder['host']}, process {holder['pid']}, since {holder['since']}"
        except (OSError, ValueError, KeyError, TypeError):
            return "which has just started"


def _shown(value: Any) -> str:
    return shown(value.value if isinstance(value, Enum) else value, 40)


def _prompt_shown(prompt: str | None) -> str:
    return "None" if prompt is None else quoted(prompt, 40)
