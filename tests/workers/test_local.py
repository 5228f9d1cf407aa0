"""workers/local.py: a whole run without Ray, and the same one with it."""

from pathlib import Path

import numpy as np
import pyarrow as pa
from safetensors import safe_open

from buffer.run_folder import RunFolder, read_metrics
from buffer.schema import tensors_of
from conf.load import load
from conf.prompts import resolve_prompts
from conf.schema import Config
from policy.policy import Policy
from policy.rollout import rollout
from tests.chaos.verdict import WEIGHTS, different
from tests.pipelines import tiny_pipeline
from tests.running import SMALL, launch
from workers import local

KEPT = ["run.batches=3", "buffer.keep_batches=3", "evaluation.every=3"]


def start(*arguments: str) -> Path:
    config: Config = load(["compressibility", *SMALL, *arguments])
    return local.run(config, resolve_prompts(config.prompts))


def lora_of(run_dir: Path) -> tuple[dict[str, str], dict[str, bytes]]:
    """Metadata and weights; the file itself has its header's keys in another order each time."""
    with safe_open(run_dir / "lora" / WEIGHTS[0], framework="np") as file:
        return file.metadata(), {key: file.get_tensor(key).tobytes() for key in file.keys()}  # noqa: SIM118


def test_it_leaves_the_same_bits_as_actors_do(tmp_path: Path) -> None:
    """Weights, optimizer, advantages, rows and scores of three batches, and what people see of them."""
    model = f"model.path={tiny_pipeline(tmp_path / 'model')}"
    here = start(model, *KEPT, f"run.dir={tmp_path}", "run.name=here")
    done = launch("compressibility", *SMALL, model, *KEPT, "run.dir=runs", "run.name=there", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    there = tmp_path / "runs" / "there"
    assert different(here, there) == []
    for name in ("samples/v00000.png", "samples/v00003.png"):
        assert (here / name).read_bytes() == (there / name).read_bytes(), name
    assert lora_of(here) == lora_of(there)
    assert (here / "report.html").exists()
    taken_by_time = ("time", "images_per_s", "throughput/", "capacity/", "waiting/")
    ours, theirs = (
        [{key: value for key, value in row.items() if not key.startswith(taken_by_time)} for row in read_metrics(path)]
        for path in (here / "metrics.jsonl", there / "metrics.jsonl")
    )
    assert sorted(ours, key=str) == sorted(theirs, key=str)


def test_it_goes_on_from_where_it_was_ended(tmp_path: Path) -> None:
    model = f"model.path={tiny_pipeline(tmp_path / 'model')}"
    whole = start(model, *KEPT, f"run.dir={tmp_path}", "run.name=whole")
    start(model, *KEPT, f"run.dir={tmp_path}", "run.name=parts", "run.batches=2", "evaluation.every=3")
    parts = start(model, *KEPT, f"run.dir={tmp_path}", "run.name=parts")
    assert different(parts, whole) == []


def test_an_objective_on_finished_pictures_alone_is_trained_and_goes_on(tmp_path: Path) -> None:
    """Samplers then store the last latents, no log-probs; nothing of policy gradients is measured."""
    model = tiny_pipeline(tmp_path / "model")
    words = [
        f"model.path={model}",
        *KEPT,
        f"run.dir={tmp_path}",
        "learner.objective=tests.workers.clean_objective:Regression",
        "learner.objective_args={timestep: 500}",
        "learner.advantage=by_group",
    ]
    whole = start(*words, "run.name=whole")
    start(*words, "run.name=parts", "run.batches=2")
    assert different(start(*words, "run.name=parts"), whole) == []

    config = RunFolder(whole).config
    sampler = Policy.load(config.model, config.sampling, config.run.seed, "cpu", trainable=False)
    rows = {row["trajectory_id"]: row for row in RunFolder(whole).trajectories().to_pylist()}
    seen = 0
    for file in (whole / "tensors").glob("b*.arrow"):
        table = pa.ipc.open_file(file).read_all()
        if "score" in table.column_names:
            continue
        assert set(table.column_names) == {"trajectory_id", "latents", "image"}
        latents = tensors_of(table)["latents"]
        assert latents.shape == (2, 1, 4, 8, 8)
        own = [rows[trajectory_id] for trajectory_id in table["trajectory_id"].to_pylist()]
        if own[0]["policy_version"] == 0:
            made = rollout(sampler, [row["prompt"] for row in own], [row["seed"] for row in own])
            assert np.array_equal(latents, made.latents[:, -1:])
            seen += 1
    assert seen

    batches = RunFolder(whole).batches
    assert len(batches) == 3
    for row in batches:
        assert row["error"] > 0 and row["loss"] > 0 and row["grad_norm"] > 0 and row["non_finite_steps"] == 0
        assert not [key for key in row if key.startswith(("ratio/", "clip_fraction", "ess/", "kl/"))]
    with safe_open(whole / "lora" / WEIGHTS[0], framework="np") as file:
        assert any(file.get_tensor(key).any() for key in file.keys() if "lora_B" in key)  # noqa: SIM118
    assert (whole / "report.html").exists()
