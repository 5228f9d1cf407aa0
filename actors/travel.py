"""Which code reaches other hosts, and a check that the settings name no file that would stay behind."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from common.errors import UserError
from conf.load import to_config
from conf.places import ROOT, portable
from conf.schema import Config

NOT_SHIPPED = ["/.git", "/.venv", "/runs", "/data", "/docs", "/tests", "__pycache__"]
IN_A_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # the variable that Ray sets where `ray job submit` started the driver


def travelling(config: Config) -> dict[str, Any]:
    """The runtime_env that brings code to other hosts: the checkout, in which actors then work, and of the user's own
    modules those that the settings name, from the folder where the user stands."""
    named = [config.model.family, config.learner.objective, config.learner.advantage]
    named += [reward.path for reward in config.rewards.values()]
    names = {path.split(":")[0].split(".")[0] for path in named if path and ":" in path}
    beside = [path for name in sorted(names) for path in (Path.cwd() / name, Path.cwd() / f"{name}.py")]
    modules = [str(path) for path in beside if path.exists() and path.parent != ROOT]
    return {"working_dir": str(ROOT), "excludes": _excludes(config)} | ({"py_modules": modules} if modules else {})


def as_sent(config: Config) -> Config:
    """The settings as actors get them: on other hosts the checkout is the copy in which they work."""
    return to_config(portable(dataclasses.asdict(config))) if config.ray.address is not None else config


def _excludes(config: Config) -> list[str]:
    """Patterns as in .gitignore."""
    run_dir = Path(config.run.dir).absolute()
    inside = run_dir.is_relative_to(ROOT) and run_dir != ROOT
    return [*NOT_SHIPPED, *([f"/{run_dir.relative_to(ROOT)}"] if inside else [])]


def check_places(config: Config) -> None:
    """Raises UserError for a relative path that means something here and nothing on another host."""
    left_out = [ROOT / pattern[1:] for pattern in _excludes(config) if pattern.startswith("/")]
    paths = {"model.path": config.model.path, "model.lora.init_from": config.model.lora.init_from}
    for key, value in paths.items():
        if not value or Path(value).is_absolute() or not Path(value).exists():
            continue
        stay = [Path.cwd()] if Path.cwd() != ROOT else left_out
        here = [folder for folder in stay if Path(value).absolute().is_relative_to(folder)]
        if here:
            raise UserError(
                f"{key}={value} lies in {here[0]}, which other hosts do not have: give an absolute path that all hosts "
                "see, a hub id, or start from the checkout with a folder that travels with it (docs/cluster.md)"
            )
    job = json.loads(os.environ.get(IN_A_JOB, "{}"))
    if (job.get("runtime_env") or {}).get("working_dir") and not Path(config.run.dir).is_absolute():
        raise UserError(
            f"run.dir={config.run.dir} lies in the job's copy of its working directory, which Ray removes: give an "
            "absolute path"
        )
