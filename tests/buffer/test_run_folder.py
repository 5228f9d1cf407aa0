"""RunFolder reads a run at any moment and leaves it as it was."""

from pathlib import Path

import numpy as np

from buffer.orders import Evaluation
from buffer.run_folder import RunFolder
from buffer.state import restarted
from conf.evaluations import FIRST
from conf.load import load
from conf.resume import save_config
from tests.buffer_toy import buffer, evaluations, finish, publish, roll_out, score, start, train
from tests.running import EXPERIMENT, SMALL


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_under_way_is_read_and_left_as_it_was(tmp_path: Path) -> None:
    b = buffer(tmp_path, evaluate_versions=(0, 1, 3))
    start(b)
    while roll_out(b):
        score(b)
    train(b)
    publish(b)
    roll_out(b)
    before = contents(tmp_path)
    run = RunFolder(tmp_path)
    assert restarted(run.state)[1:] == restarted(b.state)[1:] and run.state.next_batch == 1
    assert list(run.evaluations) == list(evaluations(b)) == [0]
    assert run.trajectories(["batch"])["batch"].to_pylist() == [0] * 8
    assert contents(tmp_path) == before
    finish(b)  # nobody took its epoch
    assert RunFolder(tmp_path).state.next_batch == 3


def test_a_finished_run_has_the_pictures_that_are_kept(tmp_path: Path) -> None:
    config = load([EXPERIMENT, *SMALL])
    save_config(tmp_path, config, ["a cat"])
    b = buffer(tmp_path, evaluate_versions=(0, 1, 3))
    finish(b)
    run = RunFolder(tmp_path)
    shown = b.evaluation(Evaluation(3, FIRST), 3)[1]
    pictures = run.pictures(Evaluation(3, FIRST), 3)
    assert shown and pictures and list(pictures) == list(shown)
    assert all(np.array_equal(pictures[id], shown[id]) for id in shown)
    assert run.pictures(Evaluation(0, FIRST), 3) is None


def test_a_folder_without_a_run_is_empty(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert (
        run.state.next_batch == -1
        and not run.history
        and not run.evaluations
        and not run.metrics
        and not run.grids[FIRST]
    )
    assert run.record == {"sittings": {}} and len(run.trajectories(["age"])) == 0
    assert not list(tmp_path.iterdir())
