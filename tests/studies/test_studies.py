"""A study makes the runs that are missing, goes on where it was interrupted, and reads what it says from them."""

import contextlib
from pathlib import Path

import numpy as np
import pytest
import torch

from buffer.run_folder import RunFolder
from common.errors import RunStopped, UserError
from conf.load import load
from conf.validate import validate
from learner.registry import make_objective
from policy.policy import Policy
from policy.rollout import rollout
from studies import algorithms, paper, settings
from studies.cells import Cell, is_over, make
from studies.curves import Seeds, gains, means, over_seeds, shown, spread
from studies.noise import parts, pictures
from tests.running import EXPERIMENT, SMALL
from tests.synthetic_run import synthetic_run


def cell(model: Path, name: str, *more: str) -> Cell:
    return Cell(name, (EXPERIMENT, *SMALL, f"model.path={model}", "run.batches=2", "evaluation.every=1", *more))


def test_a_study_goes_on_where_it_was_interrupted(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short, whole = cell(model, "a", "run.batches=1"), [cell(model, "a"), cell(model, "b", "run.seed=1")]
    make([short], tmp_path, at_once=1)
    assert is_over(short, tmp_path) and not is_over(whole[0], tmp_path)
    before = (tmp_path / "a" / "journal" / "epoch-000001.jsonl").read_bytes()
    make(whole, tmp_path, at_once=2)
    assert all(is_over(each, tmp_path) for each in whole)
    assert (tmp_path / "a" / "journal" / "epoch-000001.jsonl").read_bytes() == before
    epochs = RunFolder(tmp_path / "a").sittings
    make(whole, tmp_path)
    assert "0 of 2 runs to make" in capsys.readouterr().out and RunFolder(tmp_path / "a").sittings == epochs
    assert list(gains(tmp_path / "a")) == [0, 1, 2] and gains(tmp_path / "a")[0] == 0


def test_a_cell_that_its_guard_stopped_is_over(model: Path, tmp_path: Path) -> None:
    own = cell(model, "a", "guard.patience=1", "guard.action=stop", "learner.lr=1e-9", "run.batches=5")
    make([own], tmp_path, at_once=1)
    assert is_over(own, tmp_path) and "finished" not in RunFolder(tmp_path / "a").record
    other = Cell(own.name, (*own.words, "learner.lr=1e-8"))
    with pytest.raises(UserError, match=r"was made with other settings \(learner.lr: 1e-09 -> 1e-08\): remove it"):
        make([other], tmp_path)


def test_a_cell_that_cannot_be_ends_the_study_with_its_reason(model: Path, tmp_path: Path) -> None:
    with pytest.raises(RunStopped, match=r"the run a of the study ended: .*max_failed_share"):
        make([cell(model, "a", "rewards.compressibility.path=tests.studies.failing:Failing")], tmp_path, at_once=1)


@pytest.mark.parametrize(
    ("words", "says"),
    [(["--at-once", "0"], "'0' is no whole number of at least 1"), (["--runs", "{}/file"], "cannot be a folder")],
)
def test_what_a_study_cannot_do_is_a_sentence(
    words: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    with contextlib.suppress(SystemExit):  # of argparse
        assert paper.main(["style", *(word.format(tmp_path) for word in words)]) == 2
    assert says in capsys.readouterr().err


def test_gains_are_in_standard_deviations_of_the_base_model(tmp_path: Path) -> None:
    run_dir = synthetic_run(tmp_path, batches=8)
    tables = RunFolder(run_dir).evaluations
    base, last = (tables[version]["reward"].drop_null().to_numpy() for version in (0, 8))
    assert gains(run_dir)[8] == pytest.approx((last.mean() - base.mean()) / base.std(ddof=1), rel=1e-5)
    assert means(run_dir, "compressibility")[0] == pytest.approx(base.mean(), rel=1e-6)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9])
def test_the_first_noises_share_and_mirrored_paths_are_those_that_the_scores_were_made_with(share: float) -> None:
    """r = prompt + start + odd part of the path + even part, of variances 100, s and (1 - s) in the ratio of 3 to 1:
    mirrored paths have the correlation (even - odd) / (even + odd) = -1/2."""
    draws = np.random.default_rng(1)
    prompt, start = draws.normal(0, 10, (4000, 1, 1, 1)), draws.normal(0, share**0.5, (4000, 4, 1, 1))
    odd, even = (draws.normal(0, ((1 - share) * part) ** 0.5, (4000, 4, 4, 1)) for part in (0.75, 0.25))
    found = prompt + start + even + odd * np.array([1, -1])
    assert parts(found) == (pytest.approx(share, abs=0.02), pytest.approx(-0.5, abs=0.02))


def test_the_pictures_of_the_noise_study_are_those_of_a_rollout(model: Path) -> None:
    config = load(cell(model, "a").command(Path("runs")))
    policy = Policy.load(config.model, config.sampling, 0, "cpu", trainable=False)
    generator = torch.Generator().manual_seed(5)
    draws = [torch.randn(1, *policy.latent_shape, generator=generator) for _ in range(policy.num_steps + 1)]
    made = pictures(policy, "a cat", draws[0], torch.stack(draws[1:]))
    np.testing.assert_array_equal(made, rollout(policy, ["a cat"], [5]).images)


def test_seeds_become_means_with_errors() -> None:
    seeds = [{0: 0.0, 10: 1.0, 20: 4.0}, {0: 0.0, 10: 3.0}]
    curve = over_seeds("both", seeds, lambda version: 64 * version)
    assert (curve.xs, curve.ys, curve.errors) == ([0, 640], [0.0, 2.0], [0.0, 1.0])
    frontier = Seeds(seeds, [{0: 1.0, 10: 0.9}, {0: 1.0, 10: 0.7}]).frontier("both")
    assert (frontier.xs, frontier.ys) == ([0.0, 2.0], [1.0, pytest.approx(0.8)])
    assert spread([1.0, 3.0]) == (2.0, 1.0) and shown([1.0, 3.0]) == "+2.00 ± 1.00" and shown([1.0]) == "+1.00"


def test_a_gain_counts_while_pictures_are_still_right() -> None:
    gained, right = {0: 0.0, 3: 0.5, 6: 1.2, 9: 3.0}, {0: 1.0, 3: 0.98, 6: 0.9, 9: 0.2}
    assert algorithms.best_while_right(gained, right) == 1.2


@pytest.mark.parametrize("part", paper.PARTS)
def test_every_cell_of_the_paper_is_a_run_that_can_be(part: str, tmp_path: Path) -> None:
    cells, _ = paper.PARTS[part](tmp_path)
    assert len({each.name for each in cells}) == len(cells)
    for each in cells:
        validate(load(each.command(tmp_path)))


@pytest.mark.parametrize("name", algorithms.ALGORITHMS)
def test_every_algorithm_is_a_run_that_can_be(name: str, tmp_path: Path) -> None:
    for each in (algorithms.cell(name, "1e-3", 0), algorithms.timed(name)):
        config = load(each.command(tmp_path))
        validate(config)
        make_objective(config)


def test_every_cell_of_the_settings_is_a_run_that_can_be(tmp_path: Path) -> None:
    found = settings.every_cell()
    assert len({each.name for each in found}) == len(found)
    for each in found:
        validate(load(each.command(tmp_path)))
