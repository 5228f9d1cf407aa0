"""A run's curves: `metrics.jsonl`, one JSON object a batch or an evaluation, and the same numbers for TensorBoard.

{"batch": 7, "time": ..., "reward/mean": ...}                       ──►  reward/mean    at step 7
{"version": 7, "time": ..., "evaluation/train/reward/mean": ...}    ──►  the same key   at step 7
"""

import json
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from buffer.orders import Evaluation
from buffer.run_folder import RunFolder
from common.files import write_atomically


class MetricsLog:
    """Appends one row a batch. What lies beyond `trained` batches is cut off first: those batches are trained again.

    A row is {"batch": int, "time": unix seconds, "reward/mean": float, ...}; an evaluation's row has "version" in the
    place of "batch", and its set in every key. Numbers that are not finite are left out.
    """

    def __init__(self, run_dir: Path, trained: int) -> None:
        self.path = run_dir / "metrics.jsonl"
        rows = RunFolder(run_dir).metrics
        self.rows = [row for row in rows if row.get("batch", row.get("version", 0) - 1) < trained]
        write_atomically(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))
        self.batches = {row["batch"] for row in self.rows if "batch" in row}
        self.evaluated = {each for each, _ in self.evaluations()}
        self.earlier_batches = len(self.batches)  # rows of earlier starts
        self.earlier_evaluations = frozenset(self.evaluated)
        self.last = 0.0  # when the last row of this start was written
        self.writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=trained)
        for row in self.rows:  # the purge knows one step for all curves, and an evaluation of the newest version stays
            if row.get("version", -1) >= trained:
                self._draw(row)

    def add_batch(self, batch: int, row: dict[str, float]) -> None:
        """Once a batch: a row that is there already is left as it is."""
        if batch not in self.batches:
            self.batches.add(batch)
            now = time.time()
            speed = {"images_per_s": row["trajectories"] / (now - self.last)} if self.last else {}
            self.last = now
            self._append({"batch": batch, "time": now, **row, **speed})

    def add_evaluation(self, evaluation: Evaluation, row: dict[str, float]) -> None:
        """row: at least one finite number, by which the set is known again."""
        if evaluation not in self.evaluated:
            self.evaluated.add(evaluation)
            named = {f"evaluation/{evaluation.set}/{key}": value for key, value in row.items()}
            self._append({"version": evaluation.version, "time": time.time(), **named})

    def evaluations(self) -> list[tuple[Evaluation, dict[str, float]]]:
        """The rows of evaluations, oldest first."""
        return [(each, row) for row in self.rows if (each := evaluation_of(row)) is not None]

    def close(self) -> None:
        self.writer.close()

    def _append(self, row: dict[str, float]) -> None:
        row = {name: value for name, value in row.items() if math.isfinite(value)}
        self.rows.append(row)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._draw(row)

    def _draw(self, row: dict[str, float]) -> None:
        step = row["batch"] if "batch" in row else row["version"]
        for name, value in row.items():
            if name not in ("batch", "version", "time"):
                self.writer.add_scalar(name, value, step, walltime=row["time"])
        self.writer.flush()


def evaluation_of(row: dict[str, float]) -> Evaluation | None:
    """What a row is of; None for a batch's."""
    if "version" not in row:
        return None
    name = next((key.split("/")[1] for key in row if key.startswith("evaluation/")), None)
    return Evaluation(int(row["version"]), name) if name else None


def means_of(evaluation: Evaluation, row: dict[str, float], trained: Sequence[str]) -> dict[str, float]:
    """From an evaluation's row the mean of each measure, the reward that is trained on first; empty where no picture
    has one. trained: names of the rewards that it is made of; one that is all of it is not said twice."""
    prefix, suffix = f"evaluation/{evaluation.set}/", "/mean"
    keys = [key for key in row if key.startswith(prefix) and key.endswith(suffix)]
    means = {key.removeprefix(prefix).removesuffix(suffix): row[key] for key in keys}
    return {name: mean for name, mean in means.items() if [name] != [*trained] or mean != means.get("reward")}
