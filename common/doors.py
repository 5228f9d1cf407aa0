"""Classes by name, built in or "module:Class" of the user's own: rewards, objectives, advantages, model families."""

import importlib
import inspect
import math
import sys
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from common.blame import for_the_user_to_mend, shortened
from common.errors import UserError, shown


@dataclass(frozen=True)
class Door:
    """One kind of class that a user may write himself."""

    built_in: Mapping[str, str]  # by import path, too: who wants one does not wait for the libraries of all
    example: str  # "my_rewards:Brightness"
    method: str  # what an object of such a class has, "__call__(self, images, prompts)"

    def locate(self, where: str, path: str) -> tuple[str, str]:
        """(module, class) that `path` names. A module is looked for where Python looks, then in the working directory.

        where: how a sentence names the setting, "rewards.mine.path=my_rewards:Brightness". Raises UserError where
        there is no such class, as far as can be seen without importing it.
        """
        full = self.built_in.get(path, path)
        module, colon, class_name = full.partition(":")
        parts = [class_name, *module.split(".")]
        if not (colon and all(part.isidentifier() for part in parts)) or parts[-1] == "py":
            example_module, _, example_class = self.example.partition(":")
            raise UserError(
                f"{where} is neither built in ({', '.join(sorted(self.built_in))}) nor of the form module:Class, for "
                f"example {self.example} for the class {example_class} in {example_module}.py."
            )
        here = str(Path.cwd())
        if here not in sys.path:
            sys.path.append(here)  # last, so that no file of the user's takes the place of an installed module
        importlib.invalidate_caches()
        top = module.split(".")[0]
        if full not in self.built_in.values():
            _check_nobody_elses_name(where, top)
        if top not in sys.modules and PathFinder.find_spec(top) is None:
            raise _no_module(where, module)
        return module, class_name

    def find(self, where: str, path: str) -> type:
        """The class. Raises UserError naming the setting; an error of the device or of memory as it is."""
        module_name, class_name = self.locate(where, path)
        with for_the_user_to_mend(f"{where}: {module_name} cannot be imported", "mend it"):
            try:
                module = importlib.import_module(module_name)
            except ModuleNotFoundError as error:
                if f"{module_name}.".startswith(f"{error.name}."):
                    raise _no_module(where, module_name) from error
                raise UserError(
                    f"{where}: {module_name} needs {error.name}, which is not there; install it."
                ) from error
        kind = getattr(module, class_name, None)
        if kind is None:
            there = vars(module).items()
            own = [key for key, value in there if inspect.isclass(value) and value.__module__ == module_name]
            raise UserError(
                f"{where}: {getattr(module, '__file__', None) or module_name} has no {class_name}; it has "
                f"{shortened(', '.join(sorted(own)), 200) or 'no class at all'}."
            )
        if not isinstance(kind, type):
            raise UserError(
                f"{where}: {class_name} is a {type(kind).__name__}, not a class; give a class with a method "
                f"{self.method}."
            )
        return kind

    def make(self, setting: str, path: str, given: tuple[Any, ...], args_setting: str, args: Mapping[str, Any]) -> Any:
        """An object of the class that `setting`=`path` names: Class(*given, **args).

        args_setting: the setting that `args` came from. Raises UserError if they do not fit, or the class refuses.
        """
        kind = self.find(f"{setting}={path}", path)
        try:
            inspect.signature(kind).bind(*given, **args)
        except (TypeError, ValueError) as error:
            given_args = shortened(str(dict(args)), 200)
            raise UserError(f"{args_setting}={given_args} do not fit {path}: {error}; change the args.") from error
        _check_kinds(kind, args_setting, args)
        name = setting.removesuffix(".path")
        with for_the_user_to_mend(f"{name} ({path}) cannot be made", "mend it or its args"):
            try:
                return kind(*given, **args)
            except UserError as error:
                raise UserError(f"{name}: {error}") from error


# What a plain argument may be, by its annotation; an argument of another annotation is the class's own to check.
KINDS: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    bool: ("true or false", lambda value: isinstance(value, bool)),
    int: ("a whole number", lambda value: isinstance(value, int) and not isinstance(value, bool)),
    float: (
        "a finite number",
        lambda value: isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value),
    ),
    str: ("a text", lambda value: isinstance(value, str)),
    type(None): ("null", lambda value: value is None),
}


def _check_kinds(kind: type, args_setting: str, args: Mapping[str, Any]) -> None:
    """Raises UserError for one that is not what its annotation says."""
    parameters = inspect.signature(kind).parameters
    for name, value in args.items():
        annotation = parameters[name].annotation if name in parameters else None
        of_several = typing.get_origin(annotation) in (types.UnionType, typing.Union)
        kinds = typing.get_args(annotation) if of_several else (annotation,)
        if all(one in KINDS for one in kinds) and not any(KINDS[one][1](value) for one in kinds):
            wanted = " or ".join(KINDS[one][0] for one in kinds)
            raise UserError(f"{args_setting}.{name}={shown(value)} must be {wanted}.")


def _no_module(where: str, module: str) -> UserError:
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
