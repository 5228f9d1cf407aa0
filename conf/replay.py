"""`python launch.py replay from=runs/a,runs/b key=value ...`: settings of a run on the trajectories of other runs."""

from pathlib import Path
from typing import Any

from common.errors import UserError, shown

WORD = "replay"
FROM = "from="


def runs_of(words: list[str]) -> tuple[list[Path], list[str]]:
    """The runs that are named, and the other words. Raises UserError where none is."""
    named = [word.removeprefix(FROM) for word in words if word.startswith(FROM)]
    runs = [Path(part).expanduser().absolute() for text in named for part in text.split(",") if part]
    if not runs:
        raise UserError("a replay needs runs to learn from: python launch.py replay from=runs/a,runs/b")
    for run in runs:
        if not (run / "config.yaml").is_file():
            raise UserError(f"from={shown(str(run))} is no run (no config.yaml in it)")
    return runs, [word for word in words if not word.startswith(FROM)]


def layer(runs: list[Path], settings: dict[str, Any]) -> dict[str, Any]:
    """settings: of the first run. Those of the replay: a run of its own, beside the first, that samples nothing."""
    run = {
        **settings.get("run", {}),
        "name": f"{WORD}-of-{runs[0].name}",
        "dir": str(runs[0].parent),
        "replay": [str(path) for path in runs],
        "mirror": None,
    }
    buffer = {**settings.get("buffer", {}), "max_staleness": 0, "group_size": 1}
    return {**settings, "run": run, "buffer": buffer}
