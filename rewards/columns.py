"""What a reward may store beside its scores: columns of text, numbers, truth values, or lists of one of them.

Arrow decides, so that what is accepted here is what is stored later: as string, float64, bool, or lists of these.
"""

from collections.abc import Sequence, Set
from typing import Any

import pyarrow as pa

RESERVED = ("score", "trajectory_id")  # columns of the score tables that are not the reward's to name
LONGEST_NAME = 100  # characters
WHAT_MAY_BE = "text, numbers, truth values, or lists of them, one kind a column"


def check_name(key: Any) -> None:
    """Raises ValueError, in words, for a name that a column cannot have. Some readers take no notice of case."""
    if not isinstance(key, str) or not key or key.lower() in RESERVED:
        raise ValueError(f"names a column {key!r:.120}; choose a text other than {' and '.join(RESERVED)}")
    if not key.isprintable() or key != key.strip() or len(key) > LONGEST_NAME:
        raise ValueError(
            f"names a column {key!r:.120}; choose at most {LONGEST_NAME} printable characters, without space around"
        )


def cells_of(key: str, values: Any, count: int) -> list[Any]:
    """The `count` cells of a column as plain Python: None, str, float, bool, or lists of these. Raises ValueError, in
    words. Whole numbers become float, so that 0 in one order and 0.5 in the next are one kind."""
    given = _plain(values)
    if not isinstance(given, Sequence) or isinstance(given, str | bytes):
        raise ValueError(f"gave a {type(values).__name__} as column {key!r}; give a list of {count} cells")
    cells = [_plain(cell) for cell in given]
    if len(cells) != count:
        raise ValueError(f"gave {len(cells)} cells in column {key!r} for {count} pictures; give {count}")
    try:
        if any(isinstance(cell, Set) for cell in cells):
            raise pa.ArrowTypeError("a set has no order")
        found = pa.array(cells)
        plain: list[Any] = found.cast(_stored_type(found.type)).to_pylist()
    except (pa.ArrowException, UnicodeError, OverflowError, TypeError, ValueError) as error:
        kinds = " and ".join(sorted({_kind(cell) for cell in cells if cell is not None}))
        raise ValueError(f"put {kinds:.100} into column {key!r} ({error!s:.150}); store {WHAT_MAY_BE}") from error
    return plain


def in_words(kind: pa.DataType) -> str:
    """What a column of this type holds. Example: "lists of text"."""
    if pa.types.is_list(kind):
        return "lists" if pa.types.is_null(kind.value_type) else f"lists of {in_words(kind.value_type)}"
    names = {pa.string(): "text", pa.float64(): "numbers", pa.bool_(): "truth values"}
    return names.get(kind, "nothing")


def unified(old: pa.DataType, new: pa.DataType) -> pa.DataType:
    """The type that holds both: nothing goes with any. Raises pa.ArrowTypeError where there is none."""
    schemas = [pa.schema({"column": kind}) for kind in (old, new)]
    return pa.unify_schemas(schemas).field("column").type


def _plain(value: Any) -> Any:
    """NumPy's, torch's, pandas' and Arrow's arrays and scalars as Python's own."""
    for name in ("tolist", "to_pylist"):
        if hasattr(value, name):
            return getattr(value, name)()
    return value


def _stored_type(found: pa.DataType) -> pa.DataType:
    if pa.types.is_list(found) and not pa.types.is_list(found.value_type):
        return pa.list_(_stored_type(found.value_type))
    if pa.types.is_integer(found) or pa.types.is_floating(found):
        return pa.float64()
    if found in (pa.null(), pa.bool_(), pa.string()):
        return found
    raise pa.ArrowTypeError(f"of Arrow's type {found}")


def _kind(cell: Any) -> str:
    if isinstance(cell, list | tuple):
        return f"list of {' and '.join(sorted({type(value).__name__ for value in cell}))}"
    return type(cell).__name__
