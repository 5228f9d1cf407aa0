"""What ends a run with a sentence instead of a traceback, and how values look in it."""

LONGEST = 500  # characters of a sentence


class UserError(Exception):
    """A user's mistake: one sentence that names the offending value and the fix."""


class RunStopped(Exception):
    """The run cannot go on until someone acts; one sentence says what happened and what to do.

    Everything that was acknowledged before is on disk, and the same command goes on from it.
    """


def shown(value: object, longest: int = 100) -> str:
    """A value as a sentence shows it: in one line, without control characters, and shortened in its middle."""
    text = _shortened("null" if value is None else str(value), longest)
    return _shortened("".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in text), longest)


def quoted(value: str, longest: int = 100) -> str:
    """Like `shown`, in quotes."""
    mark = '"' if "'" in value else "'"
    return f"{mark}{shown(value, longest)}{mark}"


def in_one_line(reason: Exception) -> str:
    """A sentence as it is printed: whatever a library put into it, one line of at most 500 characters."""
    return shown(" ".join(str(reason).split()), LONGEST)


def _shortened(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[: longest - 13]}...{text[-10:]}"
