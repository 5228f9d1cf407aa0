"""The verdict on a run that something died in: what is wrong with its folder, in sentences; none when all is well.

    lost       a trajectory that was scored when the blow fell is not trained on, or with another score or table
    twice      one was rolled out, scored, or trained again
    too old    one was trained at an age above buffer.max_staleness, or on weights that are not the run's
    not finite a weight, moment, reward or advantage is not a number
    different  at max_staleness 0: weights, optimizer, advantages or rows are not those of a run that nobody disturbed

It reads files and starts nothing, and knows the buffer's rules by what they promise, not by how they are kept.
"""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file

from buffer.run_folder import RunFolder
from buffer.settings import sizes_of
from buffer.state import File, Record
from buffer.store import read_arrow
from conf.schema import Config

TIMES = {"claimed", "rolled_out", "scored", "trained"}
WEIGHTS = ("pytorch_lora_weights.safetensors", "optimizer.safetensors")


def verdict(run_dir: Path, before: list[Record], undisturbed: Path | None = None) -> list[str]:
    """What is wrong with the finished run in `run_dir`.

    before: what its journal said when the blow fell. undisturbed: a run that this one has to equal, bit for bit.
    The run keeps the tensors of all its batches (buffer.keep_batches).
    """
    run = RunFolder(run_dir)
    config, history = run.config, run.history
    missing = sorted(set(range(config.run.batches)) - {batch for batch, _ in _trained(history)})
    if missing:
        return [f"the run did not end: batches {missing} are not trained"]
    found = [*twice(run_dir, config, history), *lost(run_dir, config, before, history)]
    found += [*too_old(run_dir, config, history), *not_finite(run_dir, history)]
    return found + (different(run_dir, undisturbed) if undisturbed else [])


def twice(run_dir: Path, config: Config, history: list[Record]) -> Iterator[str]:
    """What was made or trained more than once."""
    for kind in ("rolled_out", "scored"):
        times = Counter((r["order"], r.get("reward", "")) for r in history if r["kind"] == kind)
        yield from (f"{order} was {kind} {n} times" for (order, _), n in times.items() if n > 1)
    done: set[str] = set()
    for record in history:
        if record["kind"] == "rolled_out":
            done.add(record["order"])
        elif record["kind"] == "claimed" and record["order"] in done:
            yield f"{record['order']} was claimed again after it was rolled out"
    times_trained = Counter(batch for batch, _ in _trained(history))
    yield from (f"batch {batch} was trained {n} times" for batch, n in times_trained.items() if n > 1)
    ids = Counter(row["trajectory_id"] for row in rows(run_dir))
    yield from (f"trajectory {id} was trained {n} times" for id, n in ids.items() if n > 1)
    wanted = set(range(config.run.batches * config.buffer.batch_size))
    if set(ids) != wanted:
        yield f"trajectories {sorted(wanted ^ set(ids))} are missing in trajectories/, or should not be there"


def lost(run_dir: Path, config: Config, before: list[Record], history: list[Record]) -> Iterator[str]:
    """What was scored before and is not as it was. An evaluation's orders count, too."""
    sizes = sizes_of(config)
    kept = {row["trajectory_id"]: row for row in [*rows(run_dir), *rows(run_dir, "evaluation")]}
    tables = {record["order"]: record["images"][1] for record in history if record["kind"] == "rolled_out"}
    for record in before:
        if record["kind"] != "scored":
            continue
        order, reward = record["order"], record["reward"]
        if tables.get(order) != record["table"]:
            yield f"the trajectories of {order} that {reward} had scored were lost"
        scores = _scores(run_dir, record)
        for trajectory_id in sizes.trajectory_ids(order):
            if trajectory_id not in kept:
                yield f"trajectory {trajectory_id}, which {reward} had scored, is lost"
            elif kept[trajectory_id][reward] != scores.get(trajectory_id):
                yield f"trajectory {trajectory_id} has another score of {reward} than before the blow"


def too_old(run_dir: Path, config: Config, history: list[Record]) -> Iterator[str]:
    """What was trained at an age above the bound, or made with weights that are not of this run's line."""
    digests = dict(record["version"] for record in history if record["kind"] == "trained")
    for row in rows(run_dir):
        name, age = f"trajectory {row['trajectory_id']}", row["batch"] - row["policy_version"]
        if not 0 <= age <= config.buffer.max_staleness or row["age"] != age:
            yield f"{name} was trained at age {age}, noted as {row['age']}; the bound is {config.buffer.max_staleness}"
        if digests.get(row["policy_version"]) != row["policy_digest"]:
            yield f"{name} was made by weights {row['policy_digest']}, which are not version {row['policy_version']}"


def not_finite(run_dir: Path, history: list[Record]) -> Iterator[str]:
    """Weights, moments, rewards and advantages that are not numbers."""
    files = [run_dir / newest_recovery_point(history) / name for name in WEIGHTS]
    for file in [*files, run_dir / "lora" / WEIGHTS[0]]:
        bad = [name for name, tensor in load_file(file).items() if not bool(torch.isfinite(tensor).all())]
        if bad:
            yield f"{file.relative_to(run_dir)} has numbers that are not finite in {', '.join(bad)}"
    for row in rows(run_dir):
        if not np.isfinite([row["reward"], row["advantage"]]).all():
            yield f"trajectory {row['trajectory_id']}: reward {row['reward']}, advantage {row['advantage']}"


def different(run_dir: Path, undisturbed: Path) -> list[str]:
    """Where the run is not, bit for bit, the other one."""
    points = [folder / newest_recovery_point(RunFolder(folder).history) for folder in (run_dir, undisturbed)]
    found = []
    for name in WEIGHTS:
        ours, others = (load_file(point / name) for point in points)
        if ours.keys() != others.keys() or not all(torch.equal(ours[key], others[key]) for key in ours):
            found.append(f"{name} is not that of the undisturbed run")
    states = [json.loads((point / "state.json").read_text().splitlines()[0]) for point in points]
    for part in ("advantage", "counters", "metrics"):
        if states[0][part] != states[1][part]:
            found.append(f"the {part} in state.json are not those of the undisturbed run")
    ours_rows, other_rows = (
        [{k: v for k, v in row.items() if k not in TIMES} for row in rows(folder)] for folder in (run_dir, undisturbed)
    )
    if ours_rows != other_rows:
        found.append("the rows in trajectories/ are not those of the undisturbed run")
    return found


def rows(run_dir: Path, folder: str = "trajectories") -> list[dict[str, Any]]:
    """All rows as somebody reads them who knows nothing of the journal."""
    return [row for file in sorted((run_dir / folder).glob("*.parquet")) for row in pq.read_table(file).to_pylist()]


def newest_recovery_point(history: list[Record]) -> str:
    trained = [record for record in history if record["kind"] == "trained"]
    return str(max(trained, key=lambda record: record["batch"])["recovery_point"])


def _trained(history: list[Record]) -> list[tuple[int, str]]:
    return [(record["batch"], record["parquet"]) for record in history if record["kind"] == "trained"]


def _scores(run_dir: Path, record: Record) -> dict[int, float]:
    """By trajectory, from the file that was acknowledged; none if it is not as it was."""
    table = read_arrow(run_dir, File(record["path"], record["digest"]))
    if table is None:
        return {}
    return dict(zip(table["trajectory_id"].to_pylist(), table["score"].to_pylist(), strict=True))
