"""Several learner ranks, SIGTERM and a lost buffer, in real runs of `launch.py`."""

import os
import signal
from pathlib import Path

import pytest

from tests.run_files import assert_same_run, trajectories
from tests.running import TIMEOUT_S, Launched, launched, small


def finish(run: Launched) -> str:
    output, errors = run.process.communicate(timeout=TIMEOUT_S)
    assert run.process.returncode == 0, (output, errors)
    return str(output)


def test_a_dead_rank_ends_its_group_and_the_next_goes_on_to_the_same_weights(model: Path, tmp_path: Path) -> None:
    """Rank 1 dies while it learns, once, by SIGKILL. Both runs end with the same bits."""
    command = small(model, "run", "run.batches=2", "learner.count=2", "evaluation.every=2")
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
