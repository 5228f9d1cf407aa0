"""Asking a running experiment for more or fewer samplers and rewards: `python launch.py --scale runs/<name> ...`.

The request is a file in the run folder, scale.yaml. The run's driver looks for it, does as it says, saves the counts in
config.yaml and removes it; so whoever asked sees when it is done, and needs nothing but the run folder. A request that
cannot be granted is set aside under another name: it stops no run, and is not read again.
"""

import dataclasses
import os
import re
import time
from pathlib import Path

from omegaconf import OmegaConf

from common.errors import UserError, shown
from common.files import write_atomically
from conf.load import from_file, merge, parse_overrides, read_yaml, to_config
from conf.places import is_file
from conf.resume import RunLock
from conf.schema import Config
from conf.settings import flatten
from conf.validate import check_ranges

REQUEST = "scale.yaml"
REFUSED = "scale.yaml.refused-*"
PATIENCE_S = 60.0  # of who asks; a driver looks every second
COUNT = re.compile(r"samplers\.count|rewards\.([^.]+)\.count")


def ask(run_dir: Path, words: list[str]) -> str:
    """Asks the run's driver for these counts and waits until it has done so; what changed, in words.

    Raises UserError for anything but counts of samplers and rewards, and where no driver works on the run.
    """
    run_dir = Path(os.path.realpath(run_dir))  # "." has no name, by which the lock is found
    if not is_file(run_dir / "config.yaml"):
        raise UserError(
            f"{shown(run_dir)} is not a run (no config.yaml in it): give the run's folder, such as runs/mine"
        )
    if not words:
        raise UserError(f"--scale {shown(run_dir)} asks for nothing: give counts, such as samplers.count=4")
    config, layer = from_file(run_dir / "config.yaml"), parse_overrides(words)
    scaled(config, layer)
    if not RunLock(run_dir).is_held():
        raise UserError(f"no driver works on {shown(run_dir)}: give the counts with the command that goes on with it")
    refused = set(run_dir.glob(REFUSED))
    write_atomically(run_dir / REQUEST, OmegaConf.to_yaml(layer))
    deadline = time.monotonic() + PATIENCE_S
    while (run_dir / REQUEST).exists():
        if time.monotonic() > deadline:
            (run_dir / REQUEST).unlink(missing_ok=True)
            raise UserError(f"the driver of {shown(run_dir)} has not answered for {PATIENCE_S:.0f} s: ask again")
        time.sleep(0.2)
    if set(run_dir.glob(REFUSED)) - refused:
        raise UserError(f"the driver of {shown(run_dir)} cannot do so; what it prints says why")
    return in_words(config, layer)


def requested(run_dir: Path) -> dict[str, object] | None:
    """What the driver was asked for and has not done yet; `scaled` takes it. Raises UserError for an unreadable one."""
    return read_yaml(run_dir / REQUEST) if (run_dir / REQUEST).exists() else None


def scaled(config: Config, layer: dict[str, object]) -> Config:
    """The same configuration with these counts. Raises UserError for any other setting, and for impossible counts."""
    if not layer:
        raise UserError(f"{REQUEST} asks for nothing: give counts, such as samplers.count=4")
    for key in flatten(layer):
        count = COUNT.fullmatch(key)
        if count is None:
            raise UserError(
                f"{shown(key)} cannot change while a run goes on: only samplers.count and rewards.<name>.count"
            )
        if count[1] is not None and count[1] not in config.rewards:
            raise UserError(f"{shown(key)}: the run has no such reward, only {', '.join(config.rewards)}")
    new = to_config(merge(dataclasses.asdict(config), layer, ""))
    check_ranges(new)
    return new


def set_aside(run_dir: Path, reason: object) -> str:
    """Moves a request that cannot be granted out of the driver's way, and says so in a sentence."""
    (run_dir / REQUEST).replace(run_dir / REFUSED.replace("*", str(time.time_ns())))
    return f"a request for other counts, {REQUEST}, is set aside: {reason}"


def in_words(config: Config, layer: dict[str, object]) -> str:
    """Such as "samplers.count 2 -> 6"."""
    old, new = flatten(OmegaConf.to_container(OmegaConf.structured(config))), flatten(layer)  # type: ignore[arg-type]
    return ", ".join(f"{key} {old[key]} -> {new[key]}" for key in new)
