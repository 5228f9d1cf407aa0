"""The exception for a user's mistake, and how values look in its sentence."""

LONGEST = 500  # characters of a sentence


class UserError(Exception):
    """One sentence that names the offending value and the fix; `launch.py` prints it without a traceback."""


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
