"""The exception for a user's mistake."""


class UserError(Exception):
    """One sentence that names the offending value and the fix; `launch.py` prints it without a traceback."""
