"""Settings that name a place on a disk: `~` is written out, and what could not be such a place is refused.

A path is relative to the folder where the user stands. Only `emoji_world/weights/...` in what the project itself writes
(schema.py, conf/, a run's config.yaml) lies in the checkout: it is absolute in a Config, and relative again in files.
"""

import os
import re
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path
from typing import Any

from common.errors import UserError, shown
from conf.schema import Config

ROOT = Path(__file__).resolve().parent.parent
PLACES = ("run.dir", "run.mirror", "model.path", "model.lora.init_from", "prompts.file", "ray.temp_dir")
SHIPPED = "emoji_world/weights/"
LONGEST_NAME, LONGEST_PATH = 255, 4095  # bytes that a file system takes
LONGEST_SOCKET = 107  # bytes of a Unix socket's path
SOCKET = "/session_2026-01-31_12-00-00_000000_{pid}/sockets/plasma_store"  # what Ray puts behind its folder


def is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long for a name, or signs that no name has
        return False


def anchored(value: Any, folder: Path) -> Any:
    """A text, or nested dicts of texts, with what is shipped as it lies in this folder."""
    return _mapped(value, lambda text: f"{folder}/{text}" if text.startswith(SHIPPED) else text)


def portable(value: Any) -> Any:
    """The same with what lies in this checkout relative to it, for files and hosts that know another checkout."""
    here = f"{ROOT}/"
    return _mapped(value, lambda text: text.removeprefix(here) if text.startswith(here + SHIPPED) else text)


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, dict):
        return {name: _mapped(below, change) for name, below in value.items()}
    return change(value) if isinstance(value, str) else value


def by_name(value: Any) -> Any:
    """For comparisons: what is shipped is the same in every checkout, wherever that lies or lay."""
    return re.sub(f"^/.*/(?={SHIPPED})", "", value) if isinstance(value, str) else value


def write_out(config: Config) -> None:
    """Replaces every place in `config` by where it is. Raises UserError for one that cannot be."""
    groups: list[tuple[str, Any]] = [(key, attrgetter(key.rpartition(".")[0])(config)) for key in PLACES]
    for name, own in config.evaluation.sets.items():
        groups.append((f"evaluation.sets.{name}.prompts.file", own.prompts))
    for key, group in groups:
        name = key.rpartition(".")[2]
        if (value := getattr(group, name)) is not None:
            setattr(group, name, _place(key, value))
    if config.ray.temp_dir is not None:
        config.ray.temp_dir = str(Path(config.ray.temp_dir).absolute())
    if config.run.replay:
        config.run.replay = [str(Path(_place("run.replay", path)).absolute()) for path in config.run.replay]


def _place(key: str, value: str) -> str:
    path = os.path.expanduser(value)  # noqa: PTH111, as Path would rewrite a URI
    if path.startswith("~"):
        raise UserError(f"{key}={shown(value)}: this machine has no such user, write the path out")
    if re.search(r"(^|/)\$\w", path):
        raise UserError(f"{key}={shown(value)} holds a variable, which only a shell replaces: write it out, or with ~")
    if re.match("file:/*~", path):
        raise UserError(f"{key}={shown(value)} holds a ~, which means nothing in a URI: write the path out")
    try:
        longest, length = max(len(os.fsencode(part)) for part in path.split("/")), len(os.fsencode(path))
    except UnicodeEncodeError as error:
        raise UserError(
            f"{key}={shown(value)} cannot be a file's name in this locale ({error.encoding}): "
            "start with a UTF-8 one, such as LC_ALL=C.UTF-8"
        ) from error
    if longest > LONGEST_NAME or length > LONGEST_PATH:
        raise UserError(f"{key}={shown(value)} is longer than a path can be: take a shorter one")
    return path


def check_room_for_sockets(config: Config) -> None:
    """Raises UserError if Ray, started here, could not make its sockets: their paths are short, and in ASCII."""
    if config.ray.address is not None:
        return
    variable = next((name for name in ("RAY_TMPDIR", "TMPDIR") if name in os.environ), None)
    if config.ray.temp_dir is not None:
        folder, source = config.ray.temp_dir, f"ray.temp_dir={shown(config.ray.temp_dir)}"
    elif variable is not None:
        folder, source = f"{os.environ[variable]}/ray", f"{variable}={shown(os.environ[variable])}"
    else:
        return
    over = len(os.fsencode(folder)) + len(SOCKET.format(pid=os.getpid())) - LONGEST_SOCKET
    if over > 0 or not folder.isascii():
        why = f"{over} bytes too long" if over > 0 else "not in ASCII"
        raise UserError(
            f"{source} is {why} for the sockets that Ray puts there: give ray.temp_dir=/tmp/ray, or another"
        )
