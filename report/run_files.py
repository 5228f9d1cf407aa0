"""Everything that a run's folder says, read for the report. What is missing is empty: any moment's folder reads."""

import json
import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from common.errors import UserError
from conf.load import from_file
from conf.schema import Config
from evaluation.summary import OWN, read_evaluations, read_rows
from report.record import read_record


@dataclass(frozen=True)
class RunFiles:
    name: str
    config: Config
    config_text: str
    batches: list[dict[str, float]]  # the rows of metrics.jsonl that are of batches, in order
    evaluations: dict[int, pa.Table]  # by version, see summary.py
    samples: dict[int, Path]  # picture grids by version
    sittings: list[dict[str, Any]]  # of run.json, in order
    trajectories: int  # trained on or set aside
    set_aside: dict[str, int]  # reason -> trajectories and evaluation pictures
    max_age: int | None  # largest age by the trajectories' rows


def read_run(run_dir: Path) -> RunFiles:
    """Raises common.errors.UserError if the folder has no readable config.yaml."""
    evaluations = read_evaluations(run_dir)
    rows = newest_of_each_batch(run_dir / "trajectories")
    tables = [read_rows(path, ["age", "set_aside"]) for path in rows]
    ages = [age for table in tables for age in table["age"].to_pylist() if age is not None]
    reasons = [reason for table in [*tables, *evaluations.values()] for reason in table["set_aside"].to_pylist()]
    return RunFiles(
        name=run_dir.resolve().name,
        config=from_file(run_dir / "config.yaml"),
        config_text=(run_dir / "config.yaml").read_text(encoding="utf-8"),
        batches=[row for row in read_metrics(run_dir / "metrics.jsonl") if "batch" in row],
        evaluations=evaluations,
        samples={int(path.stem[1:]): path for path in _grids(run_dir / "samples")},
        sittings=list(read_record(run_dir)["sittings"].values()),
        trajectories=sum(len(table) for table in tables),
        set_aside=dict(Counter(reason for reason in reasons if reason).most_common()),
        max_age=max(ages, default=None),
    )


def _grids(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.glob("*.png")) if re.fullmatch(r"v\d+\.png", path.name)]


def newest_of_each_batch(folder: Path) -> list[Path]:
    """One Parquet file a batch: names are <batch>.<epoch>.<attempt>.parquet, and the last of a batch's is the one
    that was trained."""
    own = (path for path in sorted(folder.glob("*.parquet")) if OWN.fullmatch(path.name))
    return list({path.name.split(".")[0]: path for path in own}.values())


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics.jsonl, without a last line that a death tore off. Raises UserError for a damaged one."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return [_row(path, number, line) for number, line in enumerate(lines, start=1) if line.endswith(b"\n")]


def _row(path: Path, number: int, line: bytes) -> dict[str, float]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{path} is damaged in line {number} ({error}): put it back, or take that line out") from error
    numbers = row.values() if isinstance(row, dict) else [None]
    if (
        not all(type(value) in (int, float) for value in numbers)
        or "time" not in row
        or not {"batch", "version"} & {*row}
    ):
        raise UserError(f"{path} is damaged in line {number}, which is no row: put it back, or take that line out")
    return row


def series(rows: list[dict[str, float]], key: str) -> tuple[list[float], list[float]]:
    """(batches, values) of one key of the metrics, where it is there and finite."""
    found = [(row["batch"], row[key]) for row in rows if math.isfinite(row.get(key, math.nan))]
    return [batch for batch, _ in found], [value for _, value in found]
