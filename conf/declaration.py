"""How a setting is declared: default, meaning, range, and whether it may change when a run goes on."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Range:
    """What a value must be."""

    holds: Callable[[Any], bool]
    sentence: str  # what a refusal says after the key and the value: "must be at least 1"


ANY = Range(lambda x: True, "")
POSITIVE = Range(lambda x: x > 0, "must be greater than 0")
NOT_NEGATIVE = Range(lambda x: x >= 0, "must not be negative")
AT_LEAST_ONE = Range(lambda x: x >= 1, "must be at least 1")
CPUS = Range(
    lambda x: x == 0 or 1e-4 <= x < 1 or (x >= 1 and x == int(x)),
    "must be a whole number, or a share between 0.0001 and 1",
)


def between(low: float, high: float) -> Range:
    return Range(lambda x: low <= x <= high, f"must lie between {low} and {high}")


def or_null(range: Range) -> Range:
    return Range(lambda x: x is None or range.holds(x), range.sentence)


SHARE = between(0, 1)
POSITIVE_SHARE = Range(lambda x: 0 < x <= 1, "must be above 0 and at most 1")
THREADS = between(1, 4096)


def setting(default: Any, meaning: str, within: Range = ANY, may_change: bool = False) -> Any:
    """A dataclass field. `meaning` is what `--help` prints."""
    metadata = {"meaning": meaning, "range": within, "may_change": may_change}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def free(default: Any, meaning: str, within: Range = ANY) -> Any:
    """A setting that may have another value when a run goes on: it changes neither what a batch is made of nor how it
    is trained, beyond last bits."""
    return setting(default, meaning, within, may_change=True)
