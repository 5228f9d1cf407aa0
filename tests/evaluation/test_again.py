"""Evaluating a finished run again, at any version and scale; the trade-off and its knee."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from buffer.run_folder import RunFolder
from common.errors import UserError
from evaluation.__main__ import main
from evaluation.again import Again
from evaluation.tradeoff import knee
from tests.running import small, user_reward
from tests.running_local import as_in_a_process_of_its_own, run_local


@pytest.fixture(scope="module")
def finished(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a second reward that is not trained on, and a further set."""
    folder = tmp_path_factory.mktemp("finished")
    words = user_reward(folder, "return images.mean(axis=(1, 2, 3)).astype(np.float32)")[:2]
    words += ["rewards.mine.weight=null", "run.batches=2", "evaluation.every=1", "learner.lr=5e-3"]
    words += ["evaluation.sets.held_out.prompts.list=[an owl,a bee]"]
    done = run_local(*small(model, "run", *words), cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "run"


@pytest.fixture
def there(finished: Path) -> Iterator[None]:
    """Started where the user's module is."""
    with as_in_a_process_of_its_own(finished.parent.parent):
        yield


@pytest.mark.parametrize("name", ["train", "held_out"])
@pytest.mark.usefixtures("there")
def test_a_version_made_again_is_what_the_run_itself_saw(name: str, finished: Path) -> None:
    run = RunFolder(finished)
    again = Again(run, name)
    for version in (0, 1, 2):
        own, made = run.sets[name][version], again.at(version)
        for column in ("prompt", "seed"):
            assert made[column].to_pylist() == own[column].to_pylist()
        for column in ("reward", "compressibility", "mine"):  # lora/ has its scale folded in: other last bits
            np.testing.assert_allclose(made[column].to_numpy(), own[column].to_numpy(), atol=0.02)
    of_base, half = again.at(2, 0.0), again.at(2, 0.5)
    np.testing.assert_allclose(of_base["mine"].to_numpy(), run.sets[name][0]["mine"].to_numpy(), atol=1e-3)
    ends = [np.abs(half["mine"].to_numpy() - run.sets[name][v]["mine"].to_numpy()).max() for v in (0, 2)]
    assert min(ends) > 0.01  # neither


@pytest.mark.usefixtures("there")
def test_a_file_of_prompts_that_has_changed_is_not_the_run_s_set(model: Path, tmp_path: Path) -> None:
    """Else other pictures would stand in the report as "the same prompts and seeds"."""
    (tmp_path / "mine.txt").write_text("an owl\na bee\n")
    words = ["evaluation.sets.mine.prompts.file=mine.txt", "run.batches=1"]
    assert run_local(*small(model, "run", *words), cwd=tmp_path).returncode == 0
    run = RunFolder(tmp_path / "runs" / "run")
    with contextlib.chdir(tmp_path):
        assert set(Again(run, "mine").at(1)["prompt"].to_pylist()) == {"an owl", "a bee"}
        (tmp_path / "mine.txt").write_text("a wasp\na crow\n")
        with pytest.raises(UserError, match="put the file of prompts back as it was"):
            Again(run, "mine")
        (run.path / "prompts.txt").write_text("")
        with pytest.raises(UserError, match=r"prompts\.txt holds no prompt"):
            Again(RunFolder(run.path), "train")


@pytest.mark.usefixtures("there")
def test_the_command_draws_the_trade_off_into_the_report(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs/run", "--scales", "0,0.5,1", "--version", "2"]) == 0
    printed = capsys.readouterr().out
    assert "| 0.5 |" in printed and "The knee of reward against mine is at scale" in printed
    assert "By the LoRA's scale" in (finished / "report.html").read_text()
    assert (finished / "scales" / "tradeoff.svg").read_text().startswith("<svg ")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["nothing"], "nothing is no run"),
        (["n" * 300], "nnn is no run"),
        (["runs/run", "--version", "7"], "has kept no LoRA of version 7: there are 0, 1, 2"),
        (["runs/run", "--set", "new"], "has no evaluation set new: there are train, held_out"),
        (["runs/run", "--scales", "a"], "--scales=a are no numbers"),
        (["runs/run", "--scales", "1", "--against", "beauty"], "--against=beauty is not measured on train"),
        (["runs/run", "--scales", "1", "--against", "reward"], "--against=reward is what is gained"),
    ],
)
@pytest.mark.usefixtures("there")
def test_what_cannot_be_is_a_sentence(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    *drawn, last = capsys.readouterr().err.strip().splitlines()
    assert says in last and all("is drawn and scored" in line for line in drawn)


@pytest.mark.parametrize(
    ("gained", "kept", "place"),
    [
        ([0, 1, 2, 3, 4], [1, 1, 1, 0.5, 0], 2),  # nothing is lost for the first half of the gain
        ([0, 1, 2, 3, 4], [1, 1, 1, 1, 1], 4),
        ([0, 0, 0], [1, 0.5, 0], 0),
        ([0, 3, 4], [1, 0.9, 0], 1),
    ],
)
def test_the_knee_is_where_more_begins_to_be_lost_than_gained(
    gained: list[float], kept: list[float], place: int
) -> None:
    assert knee(gained, kept) == place
