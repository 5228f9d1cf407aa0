"""Why a run stops, and the one place that turns a failing disk into it."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
BROKEN = (errno.EIO, errno.EROFS, errno.ESTALE, errno.ENODEV, errno.ENXIO, errno.EREMOTEIO, errno.EACCES, errno.EPERM)


class RunStopped(Exception):
    """The run cannot go on until someone acts; one sentence says what happened and what to do.

    Everything that was acknowledged before is on disk, and the same command goes on from it.
    """


@contextmanager
def disk_stops_the_run(folder: Path) -> Iterator[None]:
    """Turn errors of the disk that `folder` is on into `RunStopped`: it is full, or it failed. Other errors pass."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise RunStopped(
                f"The disk that holds {folder} is full ({error.strerror}); free some space and start the run again: "
                "it goes on from everything that was acknowledged."
            ) from error
        if error.errno in BROKEN:
            raise RunStopped(
                f"The disk that holds {folder} failed ({error.strerror}); mend it and start the run again: it goes on "
                "from everything that was acknowledged."
            ) from error
        raise
