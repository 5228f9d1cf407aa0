"""RunFolder: what a run has left so far, for whoever looks at it.

It reads a run at any moment: finished, under way, interrupted, or restored from a mirror. It takes no epoch, and writes
and removes nothing. What is not there is empty; what is damaged is a UserError that names the file.
"""

import json
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from buffer.journal import ALL_EPOCHS, read_counted
from buffer.orders import Evaluation
from buffer.rows import first_pictures
from buffer.schema import stack
from buffer.settings import sizes_of
from buffer.state import Record, State, fold
from buffer.store import read_arrow
from common.errors import UserError, shown
from conf.evaluations import FIRST
from conf.load import from_file
from conf.places import is_file
from conf.schema import Config

# How a run names its files; others may lie beside them.
BATCH = re.compile(r"b(\d+)\.e\d+\.\d+\.parquet")
EVALUATION = re.compile(r"v(\d+)\.([\w-]+)\.e\d+\.\d+\.parquet")
GRID = re.compile(r"v(\d+)\.([\w-]+)\.png")
LORA = re.compile(r"v(\d{5,})")
RECORD = "run.json"
MEND = "put it back, or remove it, as all that it says is what took how long"


class RunFolder:
    """Each property is read once, when it is first asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @cached_property
    def config(self) -> Config:
        """The run's settings. Raises UserError if the folder has no readable config.yaml."""
        return from_file(self.path / "config.yaml")

    # ---- the journal

    @cached_property
    def history(self) -> list[Record]:
        """All records that count, of all epochs."""
        folder = self.path / "journal"
        return read_counted(folder, before=ALL_EPOCHS)[0] if folder.is_dir() else []

    @cached_property
    def state(self) -> State:
        """What a start would find."""
        state = State()
        for record in self.history:
            state = fold(state, record)
        return state

    @property
    def plan(self) -> dict[str, Any]:
        """The identity of the run's plan; empty before the first start."""
        return next((record["plan"] for record in reversed(self.history) if "plan" in record), {})

    # ---- tables

    @cached_property
    def sets(self) -> dict[str, dict[int, pa.Table]]:
        """Rows of the finished evaluations by set and version; of one evaluated twice (after a restart), the last."""
        found: dict[str, dict[int, pa.Table]] = {FIRST: {}}
        for (version, name), path in self._newest("evaluation", EVALUATION).items():
            if len(table := read_rows(path)):
                found.setdefault(name, {})[int(version)] = table
        return found

    @property
    def evaluations(self) -> dict[int, pa.Table]:
        """Those of the set that every run has, by version."""
        return self.sets[FIRST]

    def trajectories(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Rows of all trained batches, those that were set aside included."""
        tables = [read_rows(path, columns) for path in self._newest("trajectories", BATCH).values()]
        return stack(tables) if tables else pa.table({name: [] for name in columns or ()})

    def pictures(self, evaluation: Evaluation, count: int) -> dict[int, np.ndarray] | None:
        """See `first_pictures`."""
        sizes = sizes_of(self.config)
        return first_pictures(lambda file: read_arrow(self.path, file), sizes, self.state, evaluation, count)

    def _newest(self, folder: str, kind: re.Pattern[str]) -> dict[tuple[str, ...], Path]:
        """The files of a kind by what their names say; of two that say the same the last, which is what counts."""
        found = ((kind.fullmatch(path.name), path) for path in sorted((self.path / folder).glob("*")))
        return {name.groups(): path for name, path in found if name}

    # ---- what people look at

    @cached_property
    def metrics(self) -> list[dict[str, float]]:
        """The rows of metrics.jsonl, without a last line that a death tore off."""
        return read_metrics(self.path / "metrics.jsonl")

    @property
    def batches(self) -> list[dict[str, float]]:
        """Those rows of them that are of batches, in order."""
        return [row for row in self.metrics if "batch" in row]

    @cached_property
    def grids(self) -> dict[str, dict[int, Path]]:
        """The grids of pictures by set and version."""
        found: dict[str, dict[int, Path]] = {FIRST: {}}
        for (version, name), path in self._newest("samples", GRID).items():
            found.setdefault(name, {})[int(version)] = path
        return found

    @property
    def loras(self) -> dict[int, Path]:
        """Folders of the evaluated versions' LoRAs."""
        return {int(version): path for (version,), path in self._newest("loras", LORA).items()}

    @property
    def best(self) -> int | None:
        """The version whose LoRA is in `lora_best/`, by the guard; None where there is none yet."""
        try:
            note = json.loads((self.path / "lora_best" / "version.json").read_text(encoding="utf-8"))
            return int(note["version"])
        except (OSError, ValueError, KeyError, TypeError):  # being written, or somebody's own
            return None

    @property
    def record(self) -> dict[str, Any]:
        """What run.json holds (report/record.py); no sittings where there is none."""
        path = self.path / RECORD
        try:
            record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"sittings": {}}
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read ({error}): {MEND}") from error
        if not isinstance(record, dict) or not isinstance(record.get("sittings"), dict):
            raise UserError(f"{path} is no record of a run: {MEND}")
        if not all(map(_is_sitting, record["sittings"].values())):
            raise UserError(f"{path} has a start without what is written of one: {MEND}")
        return record

    @property
    def sittings(self) -> list[dict[str, Any]]:
        """From a start of the run to its end, each, in order."""
        return list(self.record["sittings"].values())


def run_at(path: Path) -> RunFolder:
    """Raises UserError if there is no run."""
    if not is_file(path / "config.yaml"):
        raise UserError(f"{shown(path)} is no run (no config.yaml in it)")
    return RunFolder(path)


def grid_path(evaluation: Evaluation) -> str:
    """Where an evaluation's grid of pictures lies, relative to the run folder."""
    return f"samples/v{evaluation.version:05d}.{evaluation.set}.png"


def lora_path(version: int) -> str:
    """The folder of an evaluated version's LoRA, as any program reads it, relative to the run folder."""
    return f"loras/v{version:05d}"


def read_rows(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """A Parquet file of a run."""
    try:
        return pq.read_table(path, columns=columns and list(columns))
    except (OSError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is damaged ({reason:.150}): put it back, or take it out of the folder") from error


def read_metrics(path: Path) -> list[dict[str, float]]:
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return [_row(path, number, line) for number, line in enumerate(lines, start=1) if line.endswith(b"\n")]


def _row(path: Path, number: int, line: bytes) -> dict[str, float]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{path} is damaged in line {number} ({error}): put it back, or take that line out") from error
    numbers = row.values() if isinstance(row, dict) else [None]
    named = isinstance(row, dict) and "time" in row and bool({"batch", "version"} & row.keys())
    if not named or not all(type(value) in (int, float) for value in numbers):
        raise UserError(f"{path} is damaged in line {number}, which is no row: put it back, or take that line out")
    return dict(row)


def _is_sitting(entry: Any) -> bool:
    if not isinstance(entry, dict) or not {"started", "ended", "machine", "seconds"} <= entry.keys():
        return False
    times = (entry["started"], entry["ended"], entry.get("restarts", 0))
    places = entry["seconds"].values() if isinstance(entry["seconds"], dict) else [None]
    return (
        all(isinstance(time, int | float) for time in times)
        and isinstance(entry["machine"], dict)
        and all(isinstance(place, dict) and all(isinstance(s, int | float) for s in place.values()) for place in places)
    )
