"""Every setting by its dotted key, read from schema.py: for --help, checks, and to compare misspelled keys with."""

import dataclasses
import functools
import re
from dataclasses import dataclass
from enum import Enum
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from conf import schema
from conf.declaration import Range


@dataclass(frozen=True)
class Setting:
    """One leaf of the configuration."""

    key: str  # dotted; a dict's names are written <name>: "rewards.<name>.weight"
    type: str  # as a person reads it: "float", "list of str", "ddpo_is | ddpo_sf"
    default: str  # as it is written on the command line; "required" where there is none
    meaning: str
    range: Range
    may_change: bool  # when a run goes on


def settings(cls: type = schema.Config, prefix: str = "") -> list[Setting]:
    """All settings of a configuration class, in the order of schema.py."""
    found = []
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        key, hint = prefix + field.name, hints[field.name]
        section = section_type(hint)
        if section is not None:
            found += settings(section, f"{key}." if dataclasses.is_dataclass(hint) else f"{key}.<name>.")
        else:
            # The run's prompts are compared as they were resolved; of an evaluation set's no such copy is kept.
            fixed = {"may_change": False} if key.startswith("evaluation.") else {}
            found.append(Setting(key, type_name(hint), _default(field), **{**field.metadata, **fixed}))
    return found


@functools.cache
def _patterns() -> list[tuple[re.Pattern[str], Setting]]:
    return [(re.compile(re.escape(s.key).replace("<name>", r"[^.]+")), s) for s in settings()]


def setting_of(key: str) -> Setting | None:
    """The setting that a dotted key of a configuration is, such as "rewards.mine.weight". None for what lies within
    one: "rewards.mine.args.n"."""
    return next((setting for pattern, setting in _patterns() if pattern.fullmatch(key)), None)


def may_change(key: str) -> bool:
    """Whether a run may go on with another value of this setting."""
    while key and (setting := setting_of(key)) is None:  # what lies within a setting goes with it
        key = key.rpartition(".")[0]
    return bool(key) and setting is not None and setting.may_change


def flatten(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one dict with dotted keys; lists and empty dicts are values."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat


def section_type(hint: Any) -> type | None:
    """The dataclass that lies under a field of this type, directly or as the values of a dict; None for a leaf."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return hint
    if get_origin(hint) is dict and dataclasses.is_dataclass(get_args(hint)[1]):
        values: type = get_args(hint)[1]
        return values
    return None


def below(hint: Any, name: str) -> Any:
    """The type of what stands under a name in a group of settings of type `hint`; Any where that is not known."""
    section = section_type(hint)
    if section is None:
        return Any
    return get_type_hints(section).get(name, Any) if section is hint else section


def hint_of(key: str) -> Any:
    """The type of a setting, or of a group of settings, by its dotted key."""
    return functools.reduce(below, key.split("."), schema.Config)


def without_null(hint: Any) -> Any:
    """A type without the null that it may be."""
    return next((a for a in get_args(hint) if a is not NoneType), hint) if isinstance(hint, UnionType) else hint


def is_text(hint: Any) -> bool:
    """Whether a setting of this type is written as a text: a str, or one of some words."""
    plain = without_null(hint)
    return isinstance(plain, type) and issubclass(plain, str)


def holds_texts(hint: Any) -> bool:
    """Whether a setting of this type is a list of texts."""
    plain = without_null(hint)
    return get_origin(plain) is list and is_text(get_args(plain)[0])


def type_name(hint: Any) -> str:
    """A type in words that need no Python."""
    origin, arguments = get_origin(hint), get_args(hint)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return " | ".join(member.value for member in hint)
    if origin is UnionType:
        return " | ".join(type_name(a) if a is not type(None) else "null" for a in arguments)
    if origin is list:
        return f"list of {type_name(arguments[0])}"
    if origin is tuple:
        return f"[{', '.join(type_name(a) for a in arguments)}]"
    if origin is dict:
        return "mapping"
    return str(hint.__name__)


def _default(field: dataclasses.Field[Any]) -> str:
    value = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
    if value == "???":
        return "required"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(str, value))}]"
    return str(value)
