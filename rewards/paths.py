"""Where a reward's class is: built-in names, and "module:Class" of the user's own.

Imports neither the class nor torch, so that a misspelt one is answered at once.
"""

import importlib
import sys
from importlib.machinery import PathFinder
from pathlib import Path

from common.errors import UserError

# By import path, too: who wants one reward does not wait for the libraries of all.
BUILT_IN = {
    "aesthetic": "rewards.aesthetic:Aesthetic",
    "caption": "rewards.caption:CaptionRecall",
    "clip_score": "rewards.clip_score:ClipScore",
    "compressibility": "rewards.jpeg:JpegCompressibility",
    "incompressibility": "rewards.jpeg:JpegIncompressibility",
    "vqa": "rewards.vqa:QuestionAnswering",
}


def locate(name: str, path: str) -> tuple[str, str]:
    """(module, class) of the reward `name` of the config. A module is looked for where Python looks, and then in the
    working directory. Raises UserError where `path` names no such class, as far as can be seen without importing it.
    """
    where, path = f"rewards.{name}.path={path}", BUILT_IN.get(path, path)
    module, colon, class_name = path.partition(":")
    parts = [class_name, *module.split(".")]
    if not (colon and all(part.isidentifier() for part in parts)) or parts[-1] == "py":
        raise UserError(
            f"{where} is neither built in ({', '.join(sorted(BUILT_IN))}) nor of the form module:Class, for example "
            "my_rewards:Brightness for the class Brightness in my_rewards.py."
        )
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)  # last, so that no file of the user's takes the place of an installed module
    importlib.invalidate_caches()
    top = module.split(".")[0]
    if path not in BUILT_IN.values():
        _check_nobody_elses_name(where, top)
    if top not in sys.modules and PathFinder.find_spec(top) is None:
        raise no_module(where, module)
    return module, class_name


def no_module(where: str, module: str) -> UserError:
    file, here = f"{module.replace('.', '/')}.py", Path.cwd()
    return UserError(
        f"{where}: there is no module {module}; put {file} into {here}, or start from the folder that holds it."
    )


def _check_nobody_elses_name(where: str, top: str) -> None:
    """Raises UserError where a file of the user's own has the name of a module of Python or of a library: either that
    is imported in its place, or it takes the place of that, for everybody in the process."""
    own = next((path for path in (Path.cwd() / f"{top}.py", Path.cwd() / top) if path.exists()), None)
    elsewhere = [path for path in sys.path if Path(path).resolve() != Path.cwd()]
    if own and (top in sys.stdlib_module_names or PathFinder.find_spec(top, elsewhere)):
        raise UserError(f"{where}: {own} has the name of a module of Python or of an installed library; rename it.")
