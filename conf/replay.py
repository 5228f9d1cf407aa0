"""`python launch.py replay from=runs/a,runs/b key=value ...`: settings of a run on the trajectories of other runs."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.errors import UserError, shown
from conf.places import is_file

WORD = "replay"
FROM = "from="


def runs_of(words: list[str]) -> tuple[list[Path], list[str]]:
    """The runs that are named, and the other words. Raises UserError where none is."""
    runs = [run for word in words if word.startswith(FROM) for run in _named(word.removeprefix(FROM))]
    if not runs:
        raise UserError("a replay needs runs to learn from: python launch.py replay from=runs/a,runs/b")
    return runs, [word for word in words if not word.startswith(FROM)]


def _named(text: str) -> list[Path]:
    """By commas, unless a run's own name has one. Links are followed: what they point to may change."""
    parts = [text] if _is_run(text) else [part for part in text.split(",") if part]
    for part in parts:
        if not _is_run(part):
            raise UserError(f"{FROM}{shown(part)} is no run (no config.yaml in it)")
    return [Path(os.path.realpath(_written_out(part))) for part in parts]


def _is_run(text: str) -> bool:
    return is_file(Path(_written_out(text)) / "config.yaml")


def _written_out(text: str) -> str:
    return os.path.expanduser(text)  # noqa: PTH111, as Path raises where there is no such user


def layer(runs: list[Path], settings: Mapping[str, Any]) -> dict[str, Any]:
    """settings: of the first run. Those of the replay: a run of its own, beside the first, that samples nothing."""
    groups = {name: settings.get(name, {}) for name in ("run", "buffer")}
    for name, group in groups.items():
        if not isinstance(group, dict):
            raise UserError(f"{shown(runs[0] / 'config.yaml')}: {name} is {shown(group)}, and no group of settings")
    run = {
        **groups["run"],
        "name": f"{WORD}-of-{re.sub('[^A-Za-z0-9_.-]', '-', runs[0].name)}",
        "dir": str(runs[0].parent),
        "replay": [str(path) for path in runs],
        "mirror": None,
    }
    buffer = {**groups["buffer"], "max_staleness": 0, "group_size": 1}
    return {**settings, "run": run, "buffer": buffer}


def check_words(own: Mapping[str, Any]) -> None:
    """Raises UserError for what a user's own words cannot change."""
    if "prompts" in own:
        raise UserError(
            "prompts of a replay are those of its runs: leave prompts out, or give evaluation.sets.NAME.prompts others "
            "to be evaluated on"
        )
