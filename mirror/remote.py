"""A folder on any file system that pyarrow knows: file:///, s3://, gs:// and so on. What the mirror lies in.

Nothing here is written in place or under conditions, because object stores cannot: a file is written whole, read whole,
listed, removed. Errors are OSError or pyarrow's own, as the file system gives them: `ERRORS`.
"""

import contextlib
import hashlib
import secrets
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow.fs import FileSelector, FileSystem, FileType, LocalFileSystem

from common.errors import UserError
from common.files import sync

ERRORS = (OSError, pa.ArrowException)
CHUNK = 1 << 23  # bytes copied at once
MOST_RACES = 100  # for a folder, with heads that remove it while it is empty
RETRIED_S = 30  # how long Google's client tries by itself; a quarter of an hour unless told


class Remote:
    """Paths are relative to the folder. Calls come one at a time."""

    def __init__(self, fs: FileSystem, root: str) -> None:
        self.fs = fs
        self.root = root.rstrip("/")

    @classmethod
    def at(cls, uri: str, run_dir: Path) -> "Remote":
        """The folder under a URI that bears the run folder's name, tried out by writing, listing and removing a file.
        Raises UserError."""
        try:
            fs, base = FileSystem.from_uri(_with_patience(uri))
            if not base.strip("/"):
                raise UserError(f"run.mirror={uri} names no folder or bucket: give one, such as s3://bucket/runs")
            remote = cls(fs, f"{base.rstrip('/')}/{run_dir.name}")
            here, there = run_dir.resolve(), remote.local and remote.local.resolve()
            if there and (there.is_relative_to(here) or here.is_relative_to(there)):
                raise UserError(
                    f"run.mirror={uri} overlaps with the run folder {run_dir}: give a folder on another disk"
                )
            trial = f"epochs/.trial-{secrets.token_hex(6)}"
            remote.write(trial, b"")
            if trial not in remote.files("epochs"):
                raise UserError(f"run.mirror={uri} does not list a file that was just written: give another place")
            remote.remove([trial])
        except ERRORS as error:
            raise UserError(
                f"run.mirror={uri} cannot be used ({first_line(error)}): give a URI that pyarrow's file systems take, "
                "such as s3://bucket/runs or file:///mnt/mirror, and credentials that may list, read, write and delete"
            ) from error
        return remote

    @property
    def local(self) -> Path | None:
        """The folder, if it is on a file system of this machine."""
        return Path(self.root) if isinstance(self.fs, LocalFileSystem) else None

    def write(self, path: str, data: bytes) -> None:
        with self._open(path) as stream:
            stream.write(data)
        self._settle(path)

    def put(self, path: str, source: Path) -> str:
        """Copy a file here. Returns the sha256 of what was copied."""
        with source.open("rb") as file, self._open(path) as stream:
            digest = _copy(file, stream)
        self._settle(path)
        return digest

    def read(self, path: str) -> bytes:
        with self.fs.open_input_stream(f"{self.root}/{path}") as stream:
            data: bytes = stream.read()
            return data

    def get(self, path: str, target: Path) -> str:
        """Copy a file from here, flushed to disk. Returns the sha256 of what was copied."""
        target.parent.mkdir(parents=True, exist_ok=True)
        with self.fs.open_input_stream(f"{self.root}/{path}") as stream, target.open("wb") as file:
            digest = _copy(stream, file)
        sync(target)
        sync(target.parent)
        return digest

    def files(self, folder: str = "", recursive: bool = True) -> list[str]:
        """The files below a folder, sorted; none if there is no such folder."""
        below = FileSelector(f"{self.root}/{folder}".rstrip("/"), allow_not_found=True, recursive=recursive)
        for _ in range(MOST_RACES):
            with contextlib.suppress(FileNotFoundError):  # a folder that was seen, and went before it was listed
                found = self.fs.get_file_info(below)
                break
        else:
            found = self.fs.get_file_info(below)
        return sorted(info.path[len(self.root) + 1 :] for info in found if info.type == FileType.File)

    def remove(self, paths: list[str]) -> None:
        """Remove files, if they are there, and on a disk the folders that are empty then."""
        for path in paths:
            with contextlib.suppress(FileNotFoundError):
                self.fs.delete_file(f"{self.root}/{path}")
            for folder in (self.local / path).parents if self.local else ():
                if folder == self.local:
                    break
                try:
                    folder.rmdir()
                except FileNotFoundError:  # another head was faster
                    continue
                except OSError:  # it is not empty
                    break

    def _open(self, path: str) -> pa.NativeFile:
        target = f"{self.root}/{path}"
        for _ in range(MOST_RACES):
            try:
                return self.fs.open_output_stream(target)
            except FileNotFoundError:  # object stores have no folders; and another head may remove one that is empty
                self.fs.create_dir(target.rpartition("/")[0], recursive=True)
        return self.fs.open_output_stream(target)

    def _settle(self, path: str) -> None:
        """A disk may still have in memory what an object store has stored by the time it answers."""
        if self.local is not None:
            sync(self.local / path)
            sync((self.local / path).parent)


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _with_patience(uri: str) -> str:
    if not uri.startswith(("gs://", "gcs://")) or "retry_limit_seconds" in uri:
        return uri
    return f"{uri}{'&' if '?' in uri else '?'}retry_limit_seconds={RETRIED_S}"


def _copy(source: Any, target: Any) -> str:
    digest = hashlib.sha256()
    while chunk := source.read(CHUNK):
        digest.update(chunk)
        target.write(chunk)
    return digest.hexdigest()
