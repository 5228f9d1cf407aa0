"""A run folder as a finished run leaves it, made up: for tests of what reads run folders."""

import json
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from conf.load import load
from conf.prompts import resolve_prompts
from conf.resume import save_config
from report.grids import save_grid
from report.record import record_sitting

PAIRS = 32


def evaluation_table(version: int, rewards: np.ndarray, set_aside: tuple[int, ...] = ()) -> pa.Table:
    """The rows of one evaluation, with the columns of the buffer's; the rows in `set_aside` have no reward."""
    count = len(rewards)
    values = [None if row in set_aside else float(value) for row, value in enumerate(rewards)]
    return pa.table(
        {
            "trajectory_id": pa.array(range(-1 - version * count, -1 - (version + 1) * count, -1), pa.int64()),
            "prompt": [f"animal {row % 8} in <place> & {row % 4}" for row in range(count)],
            "prompt_id": pa.array([row % 8 for row in range(count)], pa.int32()),
            "seed": pa.array(range(1000, 1000 + count), pa.int64()),
            "policy_version": pa.array([version] * count, pa.int32()),
            "compressibility": pa.array(values, pa.float32()),
            "reward": pa.array(values, pa.float32()),
            "set_aside": ["raised ValueError" if row in set_aside else None for row in range(count)],
        }
    )


def write_evaluation(run_dir: Path, version: int, rewards: np.ndarray, set_aside: tuple[int, ...] = ()) -> None:
    (run_dir / "evaluation").mkdir(parents=True, exist_ok=True)
    table = evaluation_table(version, rewards, set_aside)
    pq.write_table(table, run_dir / "evaluation" / f"v{version:05d}.train.e0001.{version:05d}.parquet")


def synthetic_run(folder: Path, batches: int = 40) -> Path:
    """A run of `batches` batches with five evaluations, in which the reward rises."""
    run_dir = folder / "synthetic"
    rng = np.random.default_rng(0)
    config = load(["compressibility", f"run.name={run_dir.name}", f"run.dir={folder}", f"run.batches={batches}"])
    save_config(run_dir, config, resolve_prompts(config.prompts))
    rows = [
        {
            "batch": batch,
            "time": 1.7e9 + 12.0 * batch,
            "reward/mean": -3.4 + 0.02 * batch + rng.normal() * 0.05,
            "reward/std": 0.4,
            "kl/base": 0.01 * batch**1.5,
            "clip_fraction": min(1.0, 0.1 + abs(rng.normal()) * 0.05),
            "ratio/gap": 0.0,
            "age/max": 0.0,
            "grad_norm": 1.0 + abs(rng.normal()),
            "images_per_s": 5.0 + rng.normal() * 0.2,
            "loss": rng.normal() * 1e-5,
        }
        for batch in range(batches)
    ]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"batch": 99, "rew')
    base = rng.normal(-3.4, 0.4, PAIRS)
    for version in range(0, batches + 1, max(1, batches // 4)):
        rewards = base + 0.02 * version + rng.normal(0, 0.05, PAIRS)
        write_evaluation(run_dir, version, rewards, set_aside=(3,) if version == batches else ())
        ramp = np.linspace(0, 255 - 2 * version, 64 * 64 * 3).reshape(64, 64, 3)
        images = np.stack([np.roll(ramp, row * 7, axis=0) for row in range(16)]).astype(np.uint8)
        save_grid(
            run_dir / "samples" / f"v{version:05d}.train.png", images, [f"animal {i} in a place" for i in range(16)]
        )
    (run_dir / "trajectories").mkdir()
    for attempt in (1, 2):  # the second is the one that was trained
        table = pa.table({"age": pa.array([0, 1, 0]), "set_aside": [None, None, "the reward was nan"]})
        pq.write_table(table, run_dir / "trajectories" / f"b00000.e0001.{attempt:05d}.parquet")
    seconds = {
        "sampler-0": {"rolling out": 300.0, "waiting for orders: scores of compressibility": 150.0},
        "learner-0": {"updating": 180.0, "waiting for batches: rollouts": 270.0},
        "reward-compressibility-0": {"scoring": 5.0, "waiting for pictures: rollouts": 445.0},
    }
    advice = "the bottleneck is the samplers: raise samplers.count from 1 to 2"
    record_sitting(run_dir, epoch=1, started=time.time() - 450.0, seconds=seconds, restarts=1, advice=advice)
    return run_dir
