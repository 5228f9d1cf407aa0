"""The main job end to end, as a user runs it: `launch.py` in a process of its own, Ray and all, on small models."""

import json
import os
import re
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from buffer.run_folder import RunFolder, read_metrics
from buffer.schema import tensors_of
from emoji_world import judge
from policy.source import WEIGHT_NAME
from tests.pipelines import sd15_layout, tiny_pipeline
from tests.running import ROOT, SMALL, TIMEOUT_S, launch, launched, run_local, wait_for

IN_THE_FOURTH_BATCH = "learner.update:Updater._optimizer_step:8"  # where it waits until the test has done its part
TIMES = {"claimed", "rolled_out", "scored", "trained"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline(tmp_path_factory.mktemp("models") / "tiny")


def small(model: Path, name: str, *more: str) -> list[str]:
    return ["compressibility", *SMALL, f"model.path={model}", f"run.name={name}", *more]


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


@pytest.fixture(scope="module")
def undisturbed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six batches that nothing happened to."""
    work = tmp_path_factory.mktemp("undisturbed")
    done = launch(*small(model, "run", "run.batches=6"), cwd=work)
    assert done.returncode == 0, done.stderr
    return work / "runs" / "run"


def test_a_run_leaves_what_the_readme_promises(undisturbed: Path, model: Path) -> None:
    for name in ("config.yaml", "metrics.jsonl", "tensorboard", "lora", "trajectories", "samples", "report.html"):
        assert (undisturbed / name).exists(), name
    rows = [json.loads(line) for line in (undisturbed / "metrics.jsonl").read_text().splitlines()]
    assert [row["batch"] for row in rows if "batch" in row] == list(range(6))
    assert all(row["ratio/gap"] <= 5e-6 for row in rows if "batch" in row)  # rolled out in twos, learned in fives
    assert {row["version"] for row in rows if "version" in row} >= {0, 6}
    assert len(trajectories(undisturbed)) == 6 * 8
    weights = load_file(undisturbed / "lora" / "pytorch_lora_weights.safetensors")
    assert any(tensor.abs().max() > 0 for name, tensor in weights.items() if "lora_B" in name)
    assert Image.open(undisturbed / "samples" / "v00006.png").size[0] > 64


def test_a_finished_run_says_so_and_how_to_train_on(undisturbed: Path, model: Path) -> None:
    work = undisturbed.parent.parent
    before = {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*") if path.is_file()}
    again = launch(*small(model, "run", "run.batches=6"), cwd=work)
    assert again.returncode == 0
    assert "run.batches=" in again.stdout
    assert before == {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*") if path.is_file()}


def test_duckdb_answers_from_the_files(undisturbed: Path) -> None:
    rows = f"FROM '{undisturbed}/trajectories/*.parquet'"
    answer = duckdb.execute(f"SELECT prompt, policy_version, avg(reward) {rows} GROUP BY ALL").fetchall()
    assert {version for _, version, _ in answer} == set(range(6))


@pytest.mark.parametrize("samplers", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_any_number_of_samplers_gives_the_same_weights(
    samplers: int, model: Path, undisturbed: Path, tmp_path: Path
) -> None:
    done = launch(*small(model, "run", "run.batches=6", f"samplers.count={samplers}"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert_same_run(undisturbed, tmp_path / "runs" / "run")


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param("policy.rollout:rollout:15", id="during rollout"),
        pytest.param("rewards.base:score_order:15", id="during scoring", marks=pytest.mark.slow),
        pytest.param(
            "learner.update:Updater._optimizer_step:8",
            id="between two optimizer steps of a batch",
            marks=pytest.mark.slow,
        ),
        pytest.param("buffer.store:write_batch:4", id="between the recovery point and its registration"),
    ],
)
def test_kill_9_of_the_driver_and_the_same_command_again(
    fault: str, model: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """Six batches are three batches, kill -9 and the rest, wherever it strikes."""
    command, run_dir = small(model, "run", "run.batches=6"), tmp_path / "runs" / "run"
    with launched(*command, cwd=tmp_path, fault=fault) as run:
        run.wait_for_fault()
        run.kill()
        assert run.process.stdout is not None
        printed = batches_and_evaluations(run.process.stdout.read())
    assert list(RunFolder(run_dir).record["sittings"]) == ["1"]  # though it never came to its end
    done = launch(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert_same_run(undisturbed, run_dir)
    assert printed and not set(printed) & set(batches_and_evaluations(done.stdout))
    assert len(re.findall(r"^run goes on: \d of 6 batches are trained$", done.stdout, re.MULTILINE)) == 1
    sittings = RunFolder(run_dir).record["sittings"].values()
    assert len(sittings) == 2 and all(sitting["ended"] > sitting["started"] for sitting in sittings)


def batches_and_evaluations(output: str) -> list[str]:
    return re.findall(r"^(batch \d+|evaluation at version \d+)", output, re.MULTILINE)


@pytest.mark.slow
def test_a_head_lost_with_its_disk_is_followed_by_one_that_goes_on_from_the_mirror(
    model: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """Killed in its fourth batch, and its run folder is gone; the same command, and the same weights."""
    command = small(model, "run", "run.batches=6", f"run.mirror=file://{tmp_path}/mirror")
    run_dir, mirror = tmp_path / "runs" / "run", tmp_path / "mirror" / "run"
    with launched(*command, cwd=tmp_path, fault=IN_THE_FOURTH_BATCH) as run:
        run.wait_for_fault()
        wait_for("a claim of the mirror", lambda: any(mirror.glob("*/head-*.json")))
        run.kill()
    shutil.rmtree(run_dir)
    done = launch(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "was restored from the mirror" in done.stdout
    assert_same_run(undisturbed, run_dir)
    assert [row["batch"] for row in read_metrics(run_dir / "metrics.jsonl") if "batch" in row] == list(range(6))
    shutil.rmtree(run_dir)  # and once more, of the finished run
    done = launch(*command, cwd=tmp_path)
    assert done.returncode == 0 and "is finished" in done.stdout, done.stderr
    assert_same_run(undisturbed, run_dir)
    for name in ("report.html", "lora/pytorch_lora_weights.safetensors", "samples/v00006.png"):
        assert (run_dir / name).exists(), name


def test_ctrl_c_stops_with_a_recovery_point_and_the_same_command_goes_on(
    model: Path, undisturbed: Path, tmp_path: Path
) -> None:
    command = small(model, "run", "run.batches=6")
    with launched(*command, cwd=tmp_path, fault=IN_THE_FOURTH_BATCH) as run:
        run.wait_for_fault()
        run.process.send_signal(signal.SIGINT)
        run.wait_for_line("Ctrl-C")
        run.release()
        output, errors = run.process.communicate(timeout=TIMEOUT_S)
    assert run.process.returncode == 0, (output, errors)
    assert "goes on" in output
    assert len(trajectories(tmp_path / "runs" / "run")) < 6 * 8
    done = launch(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert_same_run(undisturbed, tmp_path / "runs" / "run")


def test_ctrl_c_is_not_forgotten_when_the_buffer_restarts(model: Path, tmp_path: Path) -> None:
    """It dies after it was told to hand out nothing new. Forgotten, the run would go on for a thousand batches."""
    command = small(model, "run", "run.batches=1000", "evaluation.every=1000")
    with launched(*command, cwd=tmp_path, delays="learner.update:Updater._optimizer_step:2") as run:
        run.wait_for_line("batch 1/")
        run.process.send_signal(signal.SIGINT)
        run.wait_for_line("Ctrl-C: a batch in training")
        os.kill(run.actor("BufferActor"), signal.SIGKILL)
        output, errors = run.process.communicate(timeout=TIMEOUT_S)
    assert run.process.returncode == 0, (output, errors)
    assert "stopped after" in output and "Traceback" not in output + errors


@pytest.mark.parametrize("whose", ["buffer", "driver"])
def test_a_full_disk_stops_the_run_which_goes_on_when_there_is_space(
    whose: str, model: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """The system lets one process write no file beyond 1,000 bytes, which is what a full disk or quota does to it."""
    command = small(model, "run", "run.batches=6")
    with launched(*command, cwd=tmp_path, fault=IN_THE_FOURTH_BATCH) as run:
        run.wait_for_fault()
        process = run.actor("BufferActor") if whose == "buffer" else run.process.pid
        resource.prlimit(process, resource.RLIMIT_FSIZE, (1000, 1000))
        run.release()
        output, errors = run.process.communicate(timeout=TIMEOUT_S)
    assert run.process.returncode == 2, (output, errors)
    assert "is full" in errors and "free some space" in errors and "Traceback" not in errors + output
    done = launch(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert_same_run(undisturbed, tmp_path / "runs" / "run")


def test_a_run_killed_before_its_report_is_not_finished_yet(model: Path, tmp_path: Path) -> None:
    """All batches are trained and evaluated; the same command writes what is missing."""
    command, run_dir = small(model, "run", "run.batches=1"), tmp_path / "runs" / "run"
    with launched(*command, cwd=tmp_path, fault="report.report:write_report:1") as run:
        run.wait_for_fault()
        run.kill()
    shutil.rmtree(run_dir / "lora")
    assert not (run_dir / "report.html").exists()
    for says in ("finished: over", "is finished, all 1 batches"):
        done = launch(*command, cwd=tmp_path)
        assert done.returncode == 0 and says in done.stdout, done.stdout + done.stderr
        assert (run_dir / "report.html").exists() and (run_dir / "lora" / WEIGHT_NAME).exists()


def test_plain_diffusers_reproduces_an_evaluation_picture(undisturbed: Path, model: Path) -> None:
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.load_lora_weights(undisturbed / "lora")
    pipe.set_progress_bar_config(disable=True)
    (file,) = (undisturbed / "evaluation").glob("v00006*")
    row = pq.read_table(file).to_pylist()[0]
    generator = torch.Generator().manual_seed(row["seed"])
    picture = pipe(
        row["prompt"], num_inference_steps=4, guidance_scale=3.0, eta=1.0, output_type="np", generator=generator
    ).images[0]
    assert np.abs(picture - stored_picture(undisturbed, row["trajectory_id"]) / 255).mean() < 1 / 255


def test_the_main_job_runs_on_the_layout_of_stable_diffusion_1_5(tmp_path: Path) -> None:
    """Its scheduler is PNDM's, weights have an fp16 variant, and a safety checker is listed."""
    folder = sd15_layout(tmp_path / "sd15")
    done = run_local(
        *small(folder, "run", "run.batches=2", "model.variant=fp16", "sampling.latents_dtype=float16"), cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert len(trajectories(tmp_path / "runs" / "run")) == 2 * 8


def test_the_shipped_model_trains_asynchronously_and_never_on_older_data_than_the_bound(tmp_path: Path) -> None:
    settings = ["run.name=run", f"run.dir={tmp_path}", "run.batches=6", "buffer.max_staleness=2", "samplers.count=2"]
    done = launch("compressibility", *SMALL[1:], *settings, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    rows = trajectories(tmp_path / "run")
    assert len(rows) == 6 * 8
    assert max(row["age"] for row in rows) <= 2
    assert all(row["age"] == row["batch"] - row["policy_version"] for row in rows)
    prompts, images = judge.pictures(tmp_path / "run", after=True)  # rolled out again, these are the run's own
    (file,) = (tmp_path / "run" / "evaluation").glob("v00006*")
    for row, prompt, image in zip(pq.read_table(file).to_pylist(), prompts, images, strict=True):
        assert row["prompt"] == prompt
        assert np.abs(stored_picture(tmp_path / "run", row["trajectory_id"]) - image.astype(float)).mean() < 1


USER_REWARD = """
import numpy as np

class Reward:
    name = "mine"
    def __call__(self, images, prompts):
        {body}
"""


def user_reward(folder: Path, body: str) -> list[str]:
    (folder / "my_rewards.py").write_text(USER_REWARD.format(body=body))
    return ["rewards.mine.path=my_rewards:Reward", "rewards.mine.num_cpus=0.2", "rewards.compressibility.weight=0"]


def test_a_reward_from_the_users_own_file_trains(model: Path, tmp_path: Path) -> None:
    mine = user_reward(tmp_path, "return images.mean(axis=(1, 2, 3)).astype(np.float32)")
    done = launch(*small(model, "run", "run.batches=2", *mine), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = trajectories(tmp_path / "runs" / "run")
    assert all(row["reward"] == row["mine"] > 0 for row in rows)


@pytest.mark.parametrize(
    ("body", "start"),
    [
        pytest.param("raise RuntimeError('no weights')", launch, id="raises"),
        pytest.param("return np.full(len(images), np.nan, np.float32)", run_local, id="NaN"),
        pytest.param("return np.zeros((len(images), 2), np.float32)", run_local, id="wrong shape"),
    ],
)
def test_a_reward_that_never_works_stops_before_the_first_rollout(
    body: str, start: Callable[..., CompletedProcess[str]], model: Path, tmp_path: Path
) -> None:
    done = start(*small(model, "run", *user_reward(tmp_path, body)), cwd=tmp_path)
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
    command = small(model, "run", "run.batches=6", *user_reward(tmp_path, body))
    stopped = run_local(*command, cwd=tmp_path)
    assert stopped.returncode == 2
    assert "the service is away" in stopped.stderr and "max_failed_share" in stopped.stderr
    assert len(stopped.stderr.strip().splitlines()) == 1, stopped.stderr
    (tmp_path / "mended").touch()
    done = launch(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "goes on" in done.stdout
    rows = trajectories(tmp_path / "runs" / "run")
    assert len(rows) == 6 * 8 and all(row["set_aside"] is None for row in rows)


def test_a_damaged_tensor_file_is_rolled_out_again_with_the_same_result(
    model: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """Acknowledged, then truncated while nobody looked: a run killed in training has a batch of such files."""
    command = small(model, "run", "run.batches=6")
    with launched(*command, cwd=tmp_path, fault=IN_THE_FOURTH_BATCH) as run:
        run.wait_for_fault()
        run.kill()
    victim = next((tmp_path / "runs" / "run" / "tensors").glob("b00003.01.latents.e*.arrow"))
    victim.write_bytes(victim.read_bytes()[:100])
    done = launch(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert victim.name in done.stdout
    assert_same_run(undisturbed, tmp_path / "runs" / "run")
