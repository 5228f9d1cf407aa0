"""Files of a run: Arrow tables with digests, Parquet rows, and what may be removed.

Every file is written under a temporary name, fsynced and renamed, and no name is used twice: it carries the epoch and
a number of its own. So a file either is whole or is not there, unless the disk damages it later, which the digest in
the journal shows.

    tensors/b00003.02.latents.e0001.00017.arrow             what `add` wrote: the path (latents, log-probs, ...),
    tensors/b00003.02.image.e0001.00018.arrow               and the pictures
    tensors/b00003.02.compressibility.e0001.00021.arrow     what `add_scores` wrote
    trajectories/b00003.e0001.003.parquet                   the batch's rows, written by the learner
    evaluation/v00010.train.e0001.00054.parquet             an evaluation's rows
    checkpoints/v00004.e0001.003/                           recovery points, written by the learner
"""

import contextlib
import hashlib
import io
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from buffer.orders import Evaluation
from buffer.protocol import TakenBatch
from buffer.rows import times
from buffer.schema import stack, tensors_in
from buffer.state import File, Trained
from common.files import digest_of, disk_stops_the_run, write_new

FOLDERS = ("tensors", "trajectories", "evaluation", "checkpoints")
# Names that a run gives; hidden ones are temporary, and made of them. A copy that somebody made beside them stays.
NAME = r"[bev]\d+\.(.+\.)?e\d+\.\d+"
OURS = re.compile(rf"{NAME}(\.arrow|\.parquet)?|\.{NAME}.*")
ROSTER = b"ddpo.roster"


class Store:
    """The files of one epoch. Calls come one at a time."""

    def __init__(self, run_dir: Path, epoch: int) -> None:
        self.run_dir = run_dir
        self.epoch = epoch
        self._files = 0
        for folder in FOLDERS:
            (run_dir / folder).mkdir(parents=True, exist_ok=True)

    def new_name(self, stem: str) -> str:
        """A name that nobody has used and nobody will."""
        self._files += 1
        return f"{stem}.e{self.epoch:04d}.{self._files:05d}"

    def write_arrow(self, stem: str, table: pa.Table) -> File:
        """Write a table to tensors/ as Arrow IPC. Equal tables give equal digests."""
        path = f"tensors/{self.new_name(stem)}.arrow"
        plain = table.combine_chunks().replace_schema_metadata(None)

        def write(file: IO[bytes]) -> str:
            digesting = _Digesting(file)
            with pa.ipc.new_file(digesting, plain.schema) as writer:
                writer.write_table(plain)
            return digesting.digest.hexdigest()[:16]

        with disk_stops_the_run(self.run_dir):
            return File(path, write_new(self.run_dir / path, write))

    def read_arrow(self, file: File) -> pa.Table | None:
        return read_arrow(self.run_dir, file)

    def write_evaluation(self, evaluation: Evaluation, rows: pa.Table) -> str:
        path = f"evaluation/{self.new_name(f'v{evaluation.version:05d}.{evaluation.set}')}.parquet"
        with disk_stops_the_run(self.run_dir):
            write_new(self.run_dir / path, lambda file: pq.write_table(rows, file))
        return path

    def remove(self, paths: Iterable[str]) -> None:
        """Remove files and folders that nobody needs, if they are there. A folder is renamed first, so that no half of
        it looks whole.

        A learner of an earlier epoch may still be writing there. That must not fail a start: what it puts into a folder
        meanwhile stays, under the hidden name, until the next."""
        for path in paths:
            target = self.run_dir / path
            if target.is_dir():
                hidden = target.with_name(f".{target.name.removeprefix('.')}.removed")
                with contextlib.suppress(FileNotFoundError):
                    target.rename(hidden)
                shutil.rmtree(hidden, ignore_errors=True)
            else:
                target.unlink(missing_ok=True)

    def beside(self, trained: Trained) -> list[str]:
        """What other attempts at this batch have left beside the files that count."""
        version = trained.version.number
        found = self.leftovers([trained.recovery_point], ["checkpoints"], f"v{version:05d}.")
        return found + (self.leftovers([trained.parquet], ["trajectories"], f"b{version - 1:05d}.") if version else [])

    def leftovers(self, needed: Iterable[str], folders: Iterable[str] = FOLDERS, stem: str = "") -> list[str]:
        """Files and folders of a run's own naming that are not needed: temporary, torn, or never acknowledged."""
        keep = set(needed)
        found = [f"{folder}/{path.name}" for folder in folders for path in (self.run_dir / folder).iterdir()]
        return sorted(p for p in found if p not in keep and OURS.fullmatch(p.split("/")[1]) and f"/{stem}" in p)


def read_arrow(run_dir: Path, file: File) -> pa.Table | None:
    """The table, memory-mapped; None if the file is missing or is not what its digest says."""
    path = run_dir / file.path
    with disk_stops_the_run(run_dir):
        if not path.exists() or digest_of(path)[:16] != file.digest:
            return None
        return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def write_batch(run_dir: Path, taken: TakenBatch, advantages: np.ndarray, now: float) -> str:
    """Write the Parquet rows of a batch that was trained; the learner calls it before `trained`.

    advantages: float32 [rows of taken.table]. Returns the path relative to the run folder.
    """
    live = taken.table.drop_columns(tensors_in(taken.table))
    live = live.append_column("advantage", pa.array(advantages, pa.float32()))
    rows = stack([live, taken.set_aside]).sort_by("trajectory_id")
    rows = rows.append_column("trained", times(now, rows.num_rows))
    rows = rows.replace_schema_metadata({ROSTER: taken.roster})
    with disk_stops_the_run(run_dir):
        write_new(run_dir / taken.parquet, lambda file: pq.write_table(rows, file))
    return taken.parquet


def roster_of(path: Path) -> str:
    """The roster that `write_batch` put into a batch's Parquet file."""
    return str((pq.read_schema(path).metadata or {})[ROSTER], "utf-8")


class _Digesting(io.BufferedIOBase):
    """A file that computes the sha256 of what is written to it, so that it need not be read again."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.digest = hashlib.sha256()

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return self.file.write(data)

    def tell(self) -> int:
        return self.file.tell()

    def writable(self) -> bool:
        return True
