"""From the config's words to a reward: built-in names, and classes of the user's own by import path."""

import importlib
import inspect
import sys
from collections.abc import Mapping
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from common.blame import is_the_workers, shortened
from common.errors import UserError
from rewards.base import NamedReward, describe

# By import path, too: who wants one reward does not wait for the libraries of all.
BUILT_IN = {
    "aesthetic": "rewards.aesthetic:Aesthetic",
    "caption": "rewards.caption:CaptionRecall",
    "clip_score": "rewards.clip_score:ClipScore",
    "compressibility": "rewards.jpeg:JpegCompressibility",
    "incompressibility": "rewards.jpeg:JpegIncompressibility",
    "vqa": "rewards.vqa:QuestionAnswering",
}


def resolve(name: str, path: str, args: Mapping[str, Any]) -> NamedReward:
    """The reward `name` of the config: `path` is built in or "module:Class", `args` its keyword arguments.

    A module is looked for where Python looks, and then in the working directory. Raises UserError naming the reward
    and what to change; an error of the device or of memory, which no change mends, as it is.
    """
    where = f"rewards.{name}.path={path}"
    kind = _imported(where, BUILT_IN.get(path, path))
    try:
        inspect.signature(kind).bind(**args)
    except (TypeError, ValueError) as error:
        given = shortened(str(dict(args)), 200)
        raise UserError(f"rewards.{name}.args={given} do not fit {path}: {error}; change the args.") from error
    try:
        reward = kind(**args)
    except UserError as error:
        raise UserError(f"rewards.{name}: {error}") from error
    except (Exception, SystemExit) as error:  # a user's code may raise anything, and it is the user who is told
        if is_the_workers(error):
            raise
        raise UserError(f"Reward {name} ({path}) cannot be made: {describe(error)}; mend it or its args.") from error
    if not callable(reward):
        raise UserError(f"{where} cannot be called; give the class a method __call__(self, images, prompts).")
    return NamedReward(name, reward)


def _imported(where: str, path: str) -> type:
    module_name, colon, class_name = path.partition(":")
    parts = [class_name, *module_name.split(".")]
    if not (colon and all(part.isidentifier() for part in parts)) or parts[-1] == "py":
        raise UserError(
            f"{where} is neither built in ({', '.join(sorted(BUILT_IN))}) nor of the form module:Class, for example "
            "my_rewards:Brightness for the class Brightness in my_rewards.py."
        )
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)  # last, so that no file of the user's takes the place of an installed module
    importlib.invalidate_caches()
    if path not in BUILT_IN.values():
        _check_nobody_elses_name(where, module_name.split(".")[0])
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise UserError(f"{where}: {module_name} needs {error.name}, which is not there; install it.") from error
        raise UserError(
            f"{where}: there is no module {module_name}; put {module_name.replace('.', '/')}.py into {here}, or start "
            "from the folder that holds it."
        ) from error
    except (Exception, SystemExit) as error:  # a user's code may raise anything, and it is the user who is told
        if is_the_workers(error):
            raise
        raise UserError(f"{where}: {module_name} cannot be imported: {describe(error)}; mend it.") from error
    kind = getattr(module, class_name, None)
    if kind is None:
        own = [key for key, value in vars(module).items() if inspect.isclass(value) and value.__module__ == module_name]
        raise UserError(
            f"{where}: {getattr(module, '__file__', None) or module_name} has no {class_name}; it has "
            f"{shortened(', '.join(sorted(own)), 200) or 'no class at all'}."
        )
    if not inspect.isclass(kind):
        raise UserError(
            f"{where}: {class_name} is a {type(kind).__name__}, not a class; give a class with a method "
            "__call__(self, images, prompts)."
        )
    return kind


def _check_nobody_elses_name(where: str, top: str) -> None:
    """Raises UserError where a file of the user's own has the name of a module of Python or of a library: either that
    is imported in its place, or it takes the place of that, for everybody in the process."""
    own = next((path for path in (Path.cwd() / f"{top}.py", Path.cwd() / top) if path.exists()), None)
    elsewhere = [path for path in sys.path if Path(path).resolve() != Path.cwd()]
    if own and (top in sys.stdlib_module_names or PathFinder.find_spec(top, elsewhere)):
        raise UserError(f"{where}: {own} has the name of a module of Python or of an installed library; rename it.")
