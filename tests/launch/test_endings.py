"""How a run ends before its time, in whichever way, and goes on to the same weights by the same command."""

import os
import re
import resource
import shutil
import signal
from pathlib import Path

import pytest

from buffer.run_folder import RunFolder, read_metrics
from policy.source import WEIGHT_NAME
from tests.run_files import assert_same_run, trajectories
from tests.running import TIMEOUT_S, launch, launched, small, wait_for
from tests.running_local import kill_local, launch_here, run_local

IN_THE_THIRD_BATCH = "learner.update:Updater._optimizer_step:6"  # where it waits until the test has done its part


@pytest.mark.parametrize(
    "fault",  # tests/workers/test_local.py has all four without Ray
    [
        pytest.param("policy.rollout:rollout:11", id="during rollout", marks=pytest.mark.slow),
        pytest.param("rewards.base:score_order:11", id="during scoring", marks=pytest.mark.slow),
        pytest.param(
            "learner.update:Updater._optimizer_step:6",
            id="between two optimizer steps of a batch",
            marks=pytest.mark.slow,
        ),
        pytest.param("buffer.store:write_batch:3", id="between the recovery point and its registration"),
    ],
)
def test_kill_9_of_the_driver_and_the_same_command_again(
    fault: str, model: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """Four batches are two batches, kill -9 and the rest, wherever it strikes."""
    command, run_dir = small(model, "run", "run.batches=4"), tmp_path / "runs" / "run"
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
    assert len(re.findall(r"^run goes on: \d of 4 batches are trained$", done.stdout, re.MULTILINE)) == 1
    sittings = RunFolder(run_dir).record["sittings"].values()
    assert len(sittings) == 2 and all(sitting["ended"] > sitting["started"] for sitting in sittings)


def batches_and_evaluations(output: str) -> list[str]:
    return re.findall(r"^(batch \d+|evaluation at version \d+)", output, re.MULTILINE)


@pytest.mark.slow
def test_a_head_lost_with_its_disk_is_followed_by_one_that_goes_on_from_the_mirror(
    model: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """Killed in its third batch, and its run folder is gone; the same command, and the same weights."""
    command = small(model, "run", "run.batches=4", f"run.mirror=file://{tmp_path}/mirror")
    run_dir, mirror = tmp_path / "runs" / "run", tmp_path / "mirror" / "run"
    with launched(*command, cwd=tmp_path, fault=IN_THE_THIRD_BATCH) as run:
        run.wait_for_fault()
        wait_for("a claim of the mirror", lambda: any(mirror.glob("*/head-*.json")))
        run.kill()
    shutil.rmtree(run_dir)
    done = launch(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "was restored from the mirror" in done.stdout
    assert_same_run(undisturbed, run_dir)
    assert [row["batch"] for row in read_metrics(run_dir / "metrics.jsonl") if "batch" in row] == list(range(4))
    shutil.rmtree(run_dir)  # and once more, of the finished run
    done = launch(*command, cwd=tmp_path)
    assert done.returncode == 0 and "is finished" in done.stdout, done.stderr
    assert_same_run(undisturbed, run_dir)
    for name in ("report.html", "lora/pytorch_lora_weights.safetensors", "samples/v00004.train.png"):
        assert (run_dir / name).exists(), name


def test_ctrl_c_stops_with_a_recovery_point_and_the_same_command_goes_on(
    model: Path, undisturbed: Path, tmp_path: Path
) -> None:
    command = small(model, "run", "run.batches=4")
    with launched(*command, cwd=tmp_path, fault=IN_THE_THIRD_BATCH) as run:
        run.wait_for_fault()
        run.process.send_signal(signal.SIGINT)
        run.wait_for_line("Ctrl-C")
        run.release()
        output, errors = run.process.communicate(timeout=TIMEOUT_S)
    assert run.process.returncode == 0, (output, errors)
    assert "goes on" in output
    assert len(trajectories(tmp_path / "runs" / "run")) < 4 * 8
    done = run_local(*command, cwd=tmp_path)
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
    command = small(model, "run", "run.batches=4")
    with launched(*command, cwd=tmp_path, fault=IN_THE_THIRD_BATCH) as run:
        run.wait_for_fault()
        process = run.actor("BufferActor") if whose == "buffer" else run.process.pid
        resource.prlimit(process, resource.RLIMIT_FSIZE, (1000, 1000))
        run.release()
        output, errors = run.process.communicate(timeout=TIMEOUT_S)
    assert run.process.returncode == 2, (output, errors)
    assert "is full" in errors and "free some space" in errors and "Traceback" not in errors + output
    done = run_local(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert_same_run(undisturbed, tmp_path / "runs" / "run")


def test_a_run_killed_before_its_report_is_not_finished_yet(model: Path, tmp_path: Path) -> None:
    """All batches are trained and evaluated; the same command writes what is missing."""
    command, run_dir = small(model, "run", "run.batches=1"), tmp_path / "runs" / "run"
    kill_local(*command, cwd=tmp_path, at="workers.local:write_report:1")
    shutil.rmtree(run_dir / "lora")
    assert not (run_dir / "report.html").exists()
    for start, says in ((launch, "finished: over"), (launch_here, "is finished, all 1 batches")):
        done = start(*command, cwd=tmp_path)
        assert done.returncode == 0 and says in done.stdout, done.stdout + done.stderr
        assert (run_dir / "report.html").exists() and (run_dir / "lora" / WEIGHT_NAME).exists()


def test_a_damaged_tensor_file_is_rolled_out_again_with_the_same_result(
    model: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """Acknowledged, then truncated while nobody looked: a run killed in training has a batch of such files."""
    command = small(model, "run", "run.batches=4")
    kill_local(*command, cwd=tmp_path, at=IN_THE_THIRD_BATCH)
    victim = next((tmp_path / "runs" / "run" / "tensors").glob("b00002.01.latents.e*.arrow"))
    victim.write_bytes(victim.read_bytes()[:100])
    done = launch(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert victim.name in done.stdout
    assert_same_run(undisturbed, tmp_path / "runs" / "run")
