"""A Ray that is started on this machine: what it needs, and why no worker process of it comes up."""

import os
import re
import shlex
import sys
import time
from pathlib import Path

import ray
from ray._common.utils import get_default_ray_temp_dir
from ray.exceptions import RayError, RayTaskError

from actors.placement import beside_the_driver
from common.blame import describe
from common.errors import UserError

LOOK_S = 20.0  # between two looks at what Ray has written
PATIENCE_S = 600.0  # for a first worker, where Ray says nothing
TROUBLE = re.compile(r"Error\b|No such file|not found|[Pp]ermission denied|cannot ")


def check_temp_dir(temp_dir: str | None) -> None:
    """Raises UserError if Ray could not write to its folder (None: where it lies by itself)."""
    folder = Path(temp_dir or get_default_ray_temp_dir()).absolute()
    name = "ray.temp_dir" if temp_dir else "the folder of Ray's files (by RAY_TMPDIR or TMPDIR, else below /tmp)"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        trial = folder / f".trial-{os.getpid()}"
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise UserError(
            f"{name} is {folder}, which cannot be written to ({error.strerror}): give another ray.temp_dir"
        ) from error


def own_python() -> dict[str, str]:
    """For a runtime_env: this Python's path as Ray needs it, which hands it to a shell without quotes."""
    quoted = shlex.quote(sys.executable)
    return {"py_executable": quoted} if quoted != sys.executable else {}


def wait_for_a_worker(session_dir: str) -> None:
    """Until a first worker process of this node has started, and can import what actors are made of.

    Raises UserError with Ray's reason if none does: Ray itself would try for ever. session_dir: of Ray's files.
    """
    first = ray.remote(num_cpus=0, max_retries=0)(_import_actors).options(**beside_the_driver()).remote()
    deadline = time.monotonic() + PATIENCE_S
    while not ray.wait([first], timeout=LOOK_S)[0]:
        logs = Path(session_dir) / "logs"
        reason = _last_trouble(logs / "raylet.err")
        if reason or time.monotonic() > deadline:
            why = reason or "Ray gives no reason"
            raise UserError(f"Ray's worker processes do not start here: {why} (logs: {logs})")
    try:
        ray.get(first)
    except RayTaskError as error:
        reason = str(error.cause).strip().splitlines()[-1]  # after all that Ray says of it
        raise UserError(
            f"Ray's worker processes cannot import actors/ ({reason}); a file of that name in {Path.cwd()} would be in "
            "its place: rename it, or start from another folder"
        ) from error
    except RayError as error:
        raise UserError(f"Ray's worker processes do not start here: {describe(error)}") from error


def _import_actors() -> None:
    """What this module imports, and with it the package."""


def _last_trouble(log: Path) -> str:
    """The last line that tells of an error; empty if there is none."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    return next((line.strip() for line in reversed(lines) if TROUBLE.search(line)), "")
