"""Which signs a text may hold: all that are written, in any script, and none that only steer a terminal or a file.

A prompt stands on a line of prompts.txt and in many sentences, tables and pictures. What joins or marks letters (the
joiners of family emoji and of Indic scripts, variation selectors, soft hyphens, marks of direction) is part of writing.
"""

import dataclasses
import unicodedata
from collections.abc import Iterator
from typing import Any

from common.errors import UserError, shown
from conf.schema import Config
from conf.settings import below, holds_texts, is_text, without_null

STEERING = {
    "Cc": "a control character",
    "Cs": "a byte that is no text in this locale (a UTF-8 one helps: LC_ALL=C.UTF-8)",
    "Zl": "a line separator",
    "Zp": "a paragraph separator",
}
# Written nowhere, they make a text look like another one: overrides of direction, and the mark at a file's start.
MISLEADING = {
    "\u202d": "an override of direction",
    "\u202e": "an override of direction",
    "\ufeff": "a byte order mark",
}


def unwritable(text: str) -> str | None:
    """What in `text` cannot be written, in words; None for a text that can."""
    for sign in text:
        words = MISLEADING.get(sign) or STEERING.get(unicodedata.category(sign))
        if words is not None:
            return f"{words}, U+{ord(sign):04X}"
    return None


def check_texts(config: Config) -> None:
    """Raises UserError for a text among the settings that is empty or holds what cannot be written.

    Prompts are checked where they are resolved, wherever they come from.
    """
    for key, hint, text in _texts(dataclasses.asdict(config), Config):
        if key == "prompts.list":
            continue
        belongs_to_us = is_text(hint) or holds_texts(hint)
        if belongs_to_us and not text.strip():
            null = "" if without_null(hint) is hint else ", or null for none"
            raise UserError(f"{key}={shown(text)} cannot be used: it is empty, give it a value{null}")
        problem = unwritable(text) if belongs_to_us else None if text.isascii() else _surrogate(text)
        if problem is not None:
            raise UserError(f"{key}={shown(text)} holds {problem}: leave it out")
        if "${" in text:
            raise UserError(f"{shown(key)}={shown(text)} holds ${{ after all was worked out: leave it out")


def _texts(value: Any, hint: Any, key: str = "") -> Iterator[tuple[str, Any, str]]:
    """(key, type, text) of every text below a value; the entries of a list have its key and its type."""
    if isinstance(value, str):
        yield key, hint, str(value)
    elif isinstance(value, list):
        for entry in value:
            yield from _texts(entry, hint, key)
    elif isinstance(value, dict):
        for name, entry in value.items():
            yield from _texts(entry, below(hint, str(name)), f"{key}.{name}" if key else str(name))


def _surrogate(text: str) -> str | None:
    return STEERING["Cs"] if any(unicodedata.category(sign) == "Cs" for sign in text) else None
