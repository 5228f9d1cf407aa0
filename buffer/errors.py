"""Why a run stops, and the one place that turns a full disk into it."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class RunStopped(Exception):
    """The run cannot go on until someone acts; one sentence says what happened and what to do.

    Everything that was acknowledged before is on disk, and the same command goes on from it.
    """


class Refused(Exception):
    """A call of somebody whose work does not count (any more); whoever made it drops the work and asks anew."""


@contextmanager
def full_disk_stops_the_run(folder: Path) -> Iterator[None]:
    """Turn "no space left", "quota exceeded" and "file too large" into `RunStopped`; other errors pass."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise RunStopped(
                f"The disk that holds {folder} is full ({error.strerror}); free some space and start the run again: "
                "it goes on from everything that was acknowledged."
            ) from error
        raise
