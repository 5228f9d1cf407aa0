"""Several learner ranks, and counts that change while a run goes on, in real runs of `launch.py`."""

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from buffer.journal import read_counted
from conf.load import from_file
from tests.launch.test_main_job import assert_same_run, small, trajectories
from tests.pipelines import tiny_pipeline
from tests.running import ROOT, TIMEOUT_S, Launched, launched, wait_for


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline(tmp_path_factory.mktemp("models") / "tiny")


def finish(run: Launched) -> str:
    output, errors = run.process.communicate(timeout=TIMEOUT_S)
    assert run.process.returncode == 0, (output, errors)
    return str(output)


def test_a_dead_rank_ends_its_group_and_the_next_goes_on_to_the_same_weights(model: Path, tmp_path: Path) -> None:
    """Rank 1 dies while it learns, once, by SIGKILL. Both runs end with the same bits."""
    command = small(model, "run", "run.batches=3", "learner.count=2", "evaluation.every=3")
    for folder in ("whole", "disturbed"):
        (tmp_path / folder).mkdir()
    with launched(*command, cwd=tmp_path / "whole") as run:
        finish(run)
    with launched(*command, cwd=tmp_path / "disturbed", fault="learner.update:Updater._optimizer_step:3") as run:
        run.wait_for_fault()  # one of the ranks, and the other cannot go on without it
        os.kill(run.actors("LearnerActor")[1], signal.SIGKILL)
        output = finish(run)
    assert "learner-0.0 died" in output
    assert_same_run(tmp_path / "whole" / "runs" / "run", tmp_path / "disturbed" / "runs" / "run")


def scale(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "launch.py"), "--scale", "runs/run", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT_S)


def test_counts_change_while_the_run_goes_on(model: Path, tmp_path: Path) -> None:
    """From one sampler to three, back to one in the middle of their orders, and to two: who comes back gets work."""
    folder = tmp_path / "runs" / "run"
    command = small(model, "run", "run.batches=1000", "evaluation.every=1000")
    with launched(*command, cwd=tmp_path, delays="policy.rollout:rollout:0.2") as run:
        run.wait_for_line("batch 1/")
        for words in (["samplers.count=3", "rewards.compressibility.count=2"], ["samplers.count=1"]):
            done = scale(tmp_path, *words)
            assert done.returncode == 0, done.stderr
            assert words[0].split("=")[0] in done.stdout
            wait_for(words[0], partial(count_is, int(words[0][-1]), run), run)
        assert scale(tmp_path, "samplers.count=2").returncode == 0
        wait_for("work for the second sampler-1", lambda: "sampler-1.1" in workers(folder), run)
        run.process.send_signal(signal.SIGINT)
        output = finish(run)
    assert "samplers.count 3 -> 1" in output and "died" not in output
    config = from_file(folder / "config.yaml")
    assert (config.samplers.count, config.rewards["compressibility"].count) == (2, 2)
    assert config.samplers.num_gpus == 1  # as it was given, though there is none here
    rows = trajectories(folder)
    assert [row["trajectory_id"] for row in rows] == list(range(len(rows))) and rows
    late = scale(tmp_path, "samplers.count=1")
    assert late.returncode == 2 and "no driver works on" in late.stderr


def count_is(count: int, run: Launched) -> bool:
    return len(run.actors("SamplerActor")) == count


def workers(folder: Path) -> set[str]:
    """Who has claimed anything."""
    records, _ = read_counted(folder / "journal", before=10**9)
    return {record["worker"] for record in records if record["kind"] == "claimed"}


@pytest.mark.slow
def test_sigterm_finishes_the_batch_and_the_same_command_goes_on(model: Path, tmp_path: Path) -> None:
    command = small(model, "run", "run.batches=4", "evaluation.every=4")
    with launched(*command, cwd=tmp_path, fault="learner.update:Updater._optimizer_step:3") as run:
        run.wait_for_fault()
        run.process.send_signal(signal.SIGTERM)
        run.wait_for_line("SIGTERM: a batch in training is finished first")
        run.release()
        output = finish(run)
    assert "goes on from there" in output
    assert len(trajectories(tmp_path / "runs" / "run")) < 4 * 8
    with launched(*command, cwd=tmp_path) as run:
        assert "finished" in finish(run)
    assert [row["trajectory_id"] for row in trajectories(tmp_path / "runs" / "run")] == list(range(4 * 8))


@pytest.mark.slow
def test_sigterm_before_there_is_any_version(model: Path, tmp_path: Path) -> None:
    """There is no LoRA to leave yet, and nothing to wait for."""
    command = small(model, "run", "run.batches=2", "evaluation.every=2")
    with launched(*command, cwd=tmp_path, fault="learner.recovery:write:1") as run:
        run.wait_for_fault()
        run.process.send_signal(signal.SIGTERM)
        assert "stopped after 0 batches" in finish(run)
    with launched(*command, cwd=tmp_path) as run:
        assert "finished" in finish(run)


@pytest.mark.slow
def test_a_buffer_that_cannot_come_back_stops_the_run_with_its_reason(model: Path, tmp_path: Path) -> None:
    """Its journal is damaged while it works, which the next one sees when it replays it."""
    with launched(*small(model, "run", "run.batches=1000", "evaluation.every=1000"), cwd=tmp_path) as run:
        run.wait_for_line("batch 1/")
        (journal,) = (tmp_path / "runs" / "run" / "journal").glob("*.jsonl")
        with journal.open("r+b") as file:
            file.seek(100)
            file.write(b"damage")
        os.kill(run.actor("BufferActor"), signal.SIGKILL)
        output, errors = run.process.communicate(timeout=TIMEOUT_S)
    assert run.process.returncode == 2, (output, errors)
    assert "the buffer died and did not come back: " in errors and f"the journal {journal}" in errors
    assert "Traceback" not in errors
