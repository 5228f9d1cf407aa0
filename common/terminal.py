"""Printing that never fails: what a terminal's encoding has no sign for is written in signs that every one has.

An ASCII terminal, a pipe under `LC_ALL=C`, a Latin-1 locale: a run is not to end because its reward is shown with a ±.
"""

import codecs
import io
import sys

PLAIN = dict(
    zip("“”‘’–—…→±×·▁▂▃▄▅▆▇█", ['"', '"', "'", "'", "-", "-", "...", "->", "+-", "x", "-", *"_.-=+*#@"], strict=True)
)


def print_anywhere() -> None:
    """Call it at the start of a program: stdout and stderr then take any text, whatever their encoding."""
    codecs.register_error("plain", _in_plain_signs)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="plain")


def _in_plain_signs(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    sign = PLAIN.get(error.object[error.start])
    return (sign, error.start + 1) if sign is not None else codecs.backslashreplace_errors(_one_sign(error))


def _one_sign(error: UnicodeEncodeError) -> UnicodeEncodeError:
    """Of several signs that cannot be written the first: the next may be one with a plain form."""
    return UnicodeEncodeError(error.encoding, error.object, error.start, error.start + 1, error.reason)
