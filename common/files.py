"""Files that are there whole or not at all, and how to see that one is as it was written."""

import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeVar

from common.errors import RunStopped

T = TypeVar("T")

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
BROKEN = (errno.EIO, errno.EROFS, errno.ESTALE, errno.ENODEV, errno.ENXIO, errno.EREMOTEIO, errno.EACCES, errno.EPERM)


def write_new(path: Path, write: Callable[[IO[bytes]], T]) -> T:
    """Write a file that was not there, and make it durable; gives what `write` gives. FileExistsError if there is one
    of that name."""
    if path.exists():
        raise FileExistsError(f"{path} is there already, and no file of a run is written over.")
    return _write(path, write)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file, in the place of an older one if there is one, and make it durable."""
    data = content.encode() if isinstance(content, str) else content
    _write(path, lambda file: file.write(data))


def _write(path: Path, write: Callable[[IO[bytes]], T]) -> T:
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            result = write(file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync(path.parent)
    return result


def sync(path: Path) -> None:
    """Make a file's content durable, or a folder's entries: files created, renamed, removed."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest_of(path: Path) -> str:
    """sha256 of a file's bytes, 64 characters."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sealed(body: Any) -> bytes:
    """JSON in a line, and a line with its sha256."""
    text = json.dumps(body, ensure_ascii=False, allow_nan=False).encode()
    return text + b"\n" + hashlib.sha256(text).hexdigest().encode() + b"\n"


def unsealed(data: bytes) -> Any:
    """What was sealed; None if these bytes are not as they were written."""
    text, _, seal = data.partition(b"\n")
    return json.loads(text) if seal.strip() == hashlib.sha256(text).hexdigest().encode() else None


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
