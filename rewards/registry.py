"""From the config's words to a reward: built-in names, and classes of the user's own by import path."""

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from common.blame import is_the_workers, shortened
from common.errors import UserError
from rewards.base import NamedReward, describe
from rewards.paths import locate, no_module


def resolve(name: str, path: str, args: Mapping[str, Any]) -> NamedReward:
    """The reward `name` of the config: `path` is built in or "module:Class", `args` its keyword arguments.

    Raises UserError naming the reward and what to change; an error of the device or of memory, which no change mends,
    as it is.
    """
    where = f"rewards.{name}.path={path}"
    kind = _imported(where, *locate(name, path))
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


def _imported(where: str, module_name: str, class_name: str) -> type:
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise UserError(f"{where}: {module_name} needs {error.name}, which is not there; install it.") from error
        raise no_module(where, module_name) from error
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
