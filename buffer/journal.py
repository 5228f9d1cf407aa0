"""The journal: what the buffer has promised, one checksummed JSON line for each transition, one file for each epoch.

    journal/epoch-000001.jsonl
    {"n": 0, "records": [{"kind": "opened", "epoch": 1, "seals": {}, ...}], "crc": "5c1f33a0"}
    {"n": 1, "records": [{"kind": "claimed", "order": "b00000.00", "version": [0, "9f86d081884c7d65"], ...}], "crc": ..}

A line is one transition, written with one `write` and fsynced before anybody hears the answer: all of its records
count or none does. A torn last line was never acknowledged and is dropped; a bad line with others after it means that
acknowledged work is damaged, and is refused.

Epochs (rules 15 and 16). Every start creates the next epoch's file exclusively (O_EXCL), *then* reads the earlier
ones, then writes how many bytes of each it read: the seals. Later starts read no further, so what a cut-off buffer
appends afterwards counts for nobody. From this order follows when a buffer may delete a file: if it has journaled the
reason and *then* sees no later epoch, whoever comes later reads that reason.
"""

import contextlib
import json
import os
import re
import zlib
from collections.abc import Mapping
from pathlib import Path

from buffer.state import Record
from common.errors import RunStopped, UserError
from common.files import disk_stops_the_run, sync, write_new

ALL_EPOCHS = 10**9


def counted(seals: Mapping[int, Mapping[int, int] | None]) -> dict[int, int | None]:
    """How many bytes of each epoch's journal count: None is all of it, 0 nothing.

    `seals` has, for every epoch there is, the seals in its first record, or None if that record was never written.
    The newest epoch that has one counts in full; of the earlier ones, what it says it read.
    """
    opened = [epoch for epoch, sealed in seals.items() if sealed is not None]
    if not opened:
        return dict.fromkeys(seals, 0)
    newest = max(opened)
    newest_seals = seals[newest] or {}
    return {epoch: None if epoch == newest else newest_seals.get(epoch, 0) for epoch in seals}


class Journal:
    """This epoch's journal, open for appending. `Journal(folder)` takes the next epoch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        with disk_stops_the_run(folder):
            self.epoch, self._fd = _next_epoch(folder)
        self.history, self.seals = read_counted(folder, before=self.epoch)  # records of earlier epochs that count
        self._bytes = 0
        self._lines = 0
        self._broken: str | None = None

    def append(self, records: tuple[Record, ...]) -> None:
        """Write the records of one transition and fsync. After an error nothing more is taken in this epoch."""
        if self._broken is None and (later := self.superseded()):
            self._broken = (
                f"Another driver has opened this run ({later.name} in {self.folder}); this one stops, and nothing that "
                "it does from here on counts."
            )
        if self._broken is not None:
            raise RunStopped(self._broken)
        line = encode(self._lines, records)
        try:
            with disk_stops_the_run(self.folder):
                _write_all(self._fd, line)
                os.fsync(self._fd)
        except (OSError, RunStopped) as error:
            self._broken = str(error)
            with contextlib.suppress(OSError):  # what is left of the line would be dropped at the next start anyhow
                os.ftruncate(self._fd, self._bytes)
            raise
        self._bytes += len(line)
        self._lines += 1

    def superseded(self) -> Path | None:
        """The journal of a later epoch, if there is one. Asked before anything is deleted."""
        later = self.folder / file_name(self.epoch + 1)  # epochs have no gaps: each start takes the lowest free number
        return later if later.exists() else None

    def close(self) -> None:
        os.close(self._fd)
        self._broken = "The buffer is closed."


def begin(folder: Path, epoch: int, records: tuple[Record, ...]) -> None:
    """Write the first journal of a run folder that is restored from a mirror, as one transition."""
    folder.mkdir(parents=True)
    write_new(folder / file_name(epoch), lambda file: file.write(encode(0, records)))


def file_name(epoch: int) -> str:
    return f"epoch-{epoch:06d}.jsonl"


def encode(number: int, records: tuple[Record, ...]) -> bytes:
    body = json.dumps({"n": number, "records": records}, ensure_ascii=False, allow_nan=False)[:-1]
    return f'{body}, "crc": "{zlib.crc32(body.encode()):08x}"}}\n'.encode()


def decode(line: bytes, number: int) -> list[Record] | None:
    """The records of a line; None if its checksum or number is wrong."""
    body, mark, crc = line.rpartition(b', "crc": "')
    if not mark or crc != f'{zlib.crc32(body):08x}"}}'.encode():
        return None
    entry = json.loads(body + b"}")
    return entry["records"] if entry["n"] == number else None


def read(path: Path, limit: int | None = None) -> tuple[list[Record], int]:
    """Records of one journal and how many bytes they take. With a limit, exactly that many bytes have to be whole."""
    data = path.read_bytes()
    if limit is not None and len(data) < limit:
        raise UserError(
            f"The journal {path} has {len(data)} bytes and a later epoch has read {limit}: acknowledged work is gone; "
            "restore the file from a backup, or start under another run.name."
        )
    lines = data[:limit].split(b"\n")  # the last is empty, or was cut off
    records: list[Record] = []
    size = 0
    for number, line in enumerate(lines[:-1]):
        found = decode(line, number)
        if found is None:
            if limit is None and number == len(lines) - 2 and not lines[-1]:
                break  # the last line, torn inside
            raise UserError(
                f"Line {number + 1} of the journal {path} is damaged and others follow it: acknowledged work would be "
                "lost; restore the file from a backup, or start under another run.name."
            )
        records += found
        size += len(line) + 1
    return records, size


def read_counted(folder: Path, before: int) -> tuple[list[Record], dict[int, int]]:
    """The records of epochs below `before` that count, in order, and how many bytes of each epoch's file they take."""
    epochs = [epoch for epoch in _epochs(folder) if epoch < before]
    limits = counted({epoch: _seals(folder / file_name(epoch)) for epoch in epochs})
    history: list[Record] = []
    sizes: dict[int, int] = {}
    for epoch in epochs:
        found, sizes[epoch] = read(folder / file_name(epoch), limits[epoch]) if limits[epoch] != 0 else ([], 0)
        history += found
    return history, sizes


def _seals(path: Path) -> dict[int, int] | None:
    """The seals in a journal's first record; None if the start that made it died before writing it."""
    with path.open("rb") as file:
        first, more = file.readline(), file.readline()
    records = decode(first.removesuffix(b"\n"), 0) if first.endswith(b"\n") else None
    if records is None:
        if more:
            raise UserError(
                f"Line 1 of the journal {path} is damaged and others follow it: acknowledged work would be lost; "
                "restore the file from a backup, or start under another run.name."
            )
        return None
    return {int(epoch): size for epoch, size in records[0]["seals"].items()}


def _epochs(folder: Path) -> list[int]:
    names = [re.fullmatch(r"epoch-(\d+)\.jsonl", path.name) for path in folder.glob("epoch-*.jsonl")]
    return sorted(int(name[1]) for name in names if name)


def _next_epoch(folder: Path) -> tuple[int, int]:
    while True:
        epoch = max(_epochs(folder), default=0) + 1
        try:
            fd = os.open(folder / file_name(epoch), os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            continue  # another start was quicker
        sync(folder)
        return epoch, fd


def _write_all(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]
