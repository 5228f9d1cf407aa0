"""The main job end to end, as a user runs it: `launch.py` in a process of its own, Ray and all, on small models."""

from pathlib import Path

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from buffer.run_folder import read_metrics
from emoji_world import judge
from policy.source import WEIGHT_NAME
from tests.pipelines import sd15_layout
from tests.run_files import assert_same_run, stored_picture, trajectories
from tests.running import ROOT, SMALL, launch, small, user_reward
from tests.running_local import launch_here, run_local


@pytest.fixture(scope="module")
def run(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of four batches that nothing happened to."""
    work = tmp_path_factory.mktemp("launched")
    done = launch(*small(model, "run", "run.batches=4"), cwd=work)
    assert done.returncode == 0, done.stderr
    return work / "runs" / "run"


def test_a_run_leaves_what_the_readme_promises(run: Path) -> None:
    for name in ("config.yaml", "metrics.jsonl", "tensorboard", "lora", "trajectories", "samples", "report.html"):
        assert (run / name).exists(), name
    rows = read_metrics(run / "metrics.jsonl")
    assert [row["batch"] for row in rows if "batch" in row] == list(range(4))
    assert all(row["ratio/gap"] <= 5e-6 for row in rows if "batch" in row)  # rolled out in twos, learned in sixteens
    assert {row["version"] for row in rows if "version" in row} >= {0, 4}
    assert len(trajectories(run)) == 4 * 8
    weights = load_file(run / "lora" / "pytorch_lora_weights.safetensors")
    assert any(tensor.abs().max() > 0 for name, tensor in weights.items() if "lora_B" in name)
    assert Image.open(run / "samples" / "v00004.train.png").size[0] > 64


def test_it_leaves_the_same_bits_as_the_run_without_ray(run: Path, undisturbed: Path) -> None:
    """Weights, optimizer, tracker, rows and scores of four batches, and what people see of them."""
    assert_same_run(run, undisturbed)
    for name in ("samples/v00000.train.png", "samples/v00004.train.png"):
        assert (run / name).read_bytes() == (undisturbed / name).read_bytes(), name
    assert lora_of(run) == lora_of(undisturbed)
    assert (undisturbed / "report.html").exists()
    taken_by_time = ("time", "images_per_s", "throughput/", "capacity/", "waiting/")
    ours, theirs = (
        [
            {key: value for key, value in row.items() if not key.startswith(taken_by_time)}
            for row in read_metrics(path / "metrics.jsonl")
        ]
        for path in (run, undisturbed)
    )
    assert sorted(ours, key=str) == sorted(theirs, key=str)


def lora_of(run_dir: Path) -> tuple[dict[str, str], dict[str, bytes]]:
    """Metadata and weights; the file itself has its header's keys in another order each time."""
    with safe_open(run_dir / "lora" / WEIGHT_NAME, framework="np") as file:
        return file.metadata(), {key: file.get_tensor(key).tobytes() for key in file.keys()}  # noqa: SIM118


def test_a_finished_run_says_so_and_how_to_train_on(run: Path, model: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    again = launch_here(*small(model, "run", "run.batches=4"), cwd=run.parent.parent)
    assert again.returncode == 0
    assert "run.batches=" in again.stdout
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}


def test_duckdb_answers_from_the_files(run: Path) -> None:
    rows = f"FROM '{run}/trajectories/*.parquet'"
    answer = duckdb.execute(f"SELECT prompt, policy_version, avg(reward) {rows} GROUP BY ALL").fetchall()
    assert {version for _, version, _ in answer} == set(range(4))


@pytest.mark.parametrize("samplers", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_any_number_of_samplers_gives_the_same_weights(
    samplers: int, model: Path, undisturbed: Path, tmp_path: Path
) -> None:
    done = launch(*small(model, "run", "run.batches=4", f"samplers.count={samplers}"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert_same_run(undisturbed, tmp_path / "runs" / "run")


def test_plain_diffusers_reproduces_an_evaluation_picture(run: Path, model: Path) -> None:
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.load_lora_weights(run / "lora")
    pipe.set_progress_bar_config(disable=True)
    (file,) = (run / "evaluation").glob("v00004*")
    row = pq.read_table(file).to_pylist()[0]
    generator = torch.Generator().manual_seed(row["seed"])
    picture = pipe(
        row["prompt"], num_inference_steps=3, guidance_scale=3.0, eta=1.0, output_type="np", generator=generator
    ).images[0]
    assert np.abs(picture - stored_picture(run, row["trajectory_id"]) / 255).mean() < 1 / 255


def test_the_main_job_runs_on_the_layout_of_stable_diffusion_1_5(tmp_path: Path) -> None:
    """Its scheduler is PNDM's, weights have an fp16 variant, and a safety checker is listed."""
    folder = sd15_layout(tmp_path / "sd15")
    done = run_local(
        *small(folder, "run", "run.batches=2", "model.variant=fp16", "sampling.latents_dtype=float16"), cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert len(trajectories(tmp_path / "runs" / "run")) == 2 * 8


@pytest.mark.parametrize(
    ("own", "sleep"),
    [
        (["samplers.count=2", "samplers.threads=1"], 0.0),
        (["samplers.count=2", "samplers.threads=2"], 1.0),
        (["samplers.threads=2", "rewards.mine.threads=2"], 1.0),
    ],
)
def test_threads_of_processes_that_share_cores_sleep_while_they_wait(
    own: list[str], sleep: float, model: Path, tmp_path: Path
) -> None:
    body = "import os; return np.full(len(images), os.environ.get('OMP_WAIT_POLICY') == 'passive', np.float32)"
    words = ["run.batches=1", *user_reward(tmp_path, body), *own]
    done = launch(*small(model, "run", *words), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert {row["mine"] for row in trajectories(tmp_path / "runs" / "run")} == {sleep}


def test_the_shipped_model_trains_asynchronously_and_never_on_older_data_than_the_bound(tmp_path: Path) -> None:
    settings = ["run.name=run", f"run.dir={tmp_path}", "run.batches=4", "buffer.max_staleness=2", "samplers.count=2"]
    done = launch("compressibility", *SMALL[1:], *settings, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    rows = trajectories(tmp_path / "run")
    assert len(rows) == 4 * 8
    assert max(row["age"] for row in rows) <= 2
    assert all(row["age"] == row["batch"] - row["policy_version"] for row in rows)
    prompts, images = judge.pictures(tmp_path / "run", after=True)  # rolled out again, these are the run's own
    (file,) = (tmp_path / "run" / "evaluation").glob("v00004.train*")
    for row, prompt, image in zip(pq.read_table(file).to_pylist(), prompts, images, strict=True):
        assert row["prompt"] == prompt
        assert np.abs(stored_picture(tmp_path / "run", row["trajectory_id"]) - image.astype(float)).mean() < 1


@pytest.mark.parametrize(
    "body",
    [
        pytest.param("raise RuntimeError('no weights')", id="raises"),
        pytest.param("return np.full(len(images), np.nan, np.float32)", id="NaN"),
        pytest.param("return np.zeros((len(images), 2), np.float32)", id="wrong shape"),
    ],
)
def test_a_reward_that_never_works_stops_before_the_first_rollout(body: str, model: Path, tmp_path: Path) -> None:
    done = run_local(*small(model, "run", *user_reward(tmp_path, body)), cwd=tmp_path)
    assert done.returncode == 2
    assert "mine" in done.stderr and "Traceback" not in done.stderr + done.stdout
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert not (tmp_path / "runs" / "run").exists()


def test_a_reward_that_begins_to_fail_stops_the_run_which_goes_on_after_it_is_mended(
    model: Path, tmp_path: Path
) -> None:
    body = (
        "from pathlib import Path\n"
        "        with open('calls', 'a') as calls: calls.write('x')\n"
        "        broken = Path('calls').stat().st_size > 12 and not Path('mended').exists()\n"
        "        if broken: raise OSError('the service is away')\n"
        "        return np.zeros(len(images), np.float32)"
    )
    command = small(model, "run", "run.batches=4", *user_reward(tmp_path, body))
    stopped = run_local(*command, cwd=tmp_path)
    assert stopped.returncode == 2
    assert "the service is away" in stopped.stderr and "max_failed_share" in stopped.stderr
    assert len(stopped.stderr.strip().splitlines()) == 1, stopped.stderr
    (tmp_path / "mended").touch()
    done = run_local(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = trajectories(tmp_path / "runs" / "run")
    assert len(rows) == 4 * 8 and all(row["set_aside"] is None for row in rows)
