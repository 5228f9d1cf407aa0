"""What a real run leaves in its folder, for tests to look at and compare."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file

from buffer.schema import tensors_of

TIMES = {"claimed", "rolled_out", "scored", "trained"}


def newest_recovery_point(run_dir: Path) -> Path:
    return max((run_dir / "checkpoints").glob("v*"))


def trajectories(run_dir: Path) -> list[dict[str, Any]]:
    """All rows, but for their times, in order of their ids."""
    rows = [
        row for file in sorted((run_dir / "trajectories").glob("*.parquet")) for row in pq.read_table(file).to_pylist()
    ]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def state(point: Path) -> dict[str, Any]:
    """Version, advantages, counters, settings and metrics, but for the digests of files: safetensors writes the keys of
    its header in another order every time."""
    body: dict[str, Any] = json.loads((point / "state.json").read_text().splitlines()[0])
    return {key: value for key, value in body.items() if key != "files"}


def assert_same_run(one: Path, other: Path) -> None:
    """Bit for bit: LoRA, optimizer, remembered rewards and all rows of trajectories."""
    first, second = newest_recovery_point(one), newest_recovery_point(other)
    assert first.name.split(".")[0] == second.name.split(".")[0]
    for file in ("pytorch_lora_weights.safetensors", "optimizer.safetensors"):
        tensors, others = load_file(first / file), load_file(second / file)
        assert tensors.keys() == others.keys()
        assert all(torch.equal(tensors[name], others[name]) for name in tensors), file
    assert state(first) == state(second)
    assert trajectories(one) == trajectories(other)


def stored_picture(run_dir: Path, trajectory_id: int) -> np.ndarray:
    """uint8 [H, W, 3] from the tensor files."""
    for file in (run_dir / "tensors").glob("*.arrow"):
        table = pa.ipc.open_file(pa.memory_map(str(file))).read_all()
        if "image" in table.column_names and trajectory_id in table["trajectory_id"].to_pylist():
            row = table["trajectory_id"].to_pylist().index(trajectory_id)
            return tensors_of(table)["image"][row]
    raise AssertionError(f"no picture of trajectory {trajectory_id} is kept")
