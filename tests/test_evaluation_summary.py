"""Before and after over fixed pairs, against numbers worked out by hand."""

import math
from pathlib import Path

import numpy as np
import pytest

from evaluation.summary import by_prompt, compare, curve, read_evaluations, reward_names
from tests.synthetic_run import write_evaluation


def test_the_paired_difference_by_hand(tmp_path: Path) -> None:
    write_evaluation(tmp_path, 0, np.array([1.0, 2.0, 3.0, 4.0]))
    write_evaluation(tmp_path, 10, np.array([0.0, 0.0, 0.0, 0.0]))
    write_evaluation(tmp_path, 20, np.array([2.0, 3.0, 5.0, 6.0]))  # differences 1, 1, 2, 2
    change = compare(tmp_path)
    assert change is not None
    assert (change.before, change.after, change.count) == (0, 20, 4)
    assert change.before_mean == 2.5 and change.after_mean == 4.0 and change.difference == 1.5
    assert change.before_std == pytest.approx(math.sqrt(5 / 3))
    assert change.standard_error == pytest.approx(math.sqrt(1 / 3) / 2)
    assert change.gain == pytest.approx(1.5 / math.sqrt(5 / 3))


def test_a_pair_set_aside_at_either_end_is_left_out(tmp_path: Path) -> None:
    write_evaluation(tmp_path, 0, np.array([1.0, 2.0, 3.0, 50.0]), set_aside=(3,))
    write_evaluation(tmp_path, 1, np.array([2.0, 90.0, 4.0, 5.0]), set_aside=(1,))
    change = compare(tmp_path)
    assert change is not None
    assert change.count == 2 and change.before_mean == 2.0 and change.difference == 1.0
    assert change.standard_error == 0.0


def test_pairs_are_matched_by_prompt_and_seed_not_by_row(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    write_evaluation(tmp_path, 0, np.array([1.0, 5.0, 3.0]))
    write_evaluation(tmp_path, 1, np.array([1.5, 5.5, 3.5]))
    path = next((tmp_path / "evaluation").glob("v00001*"))
    pq.write_table(pq.read_table(path).take([2, 0, 1]), path)
    change = compare(tmp_path)
    assert change is not None and change.difference == 0.5 and change.standard_error == 0.0


def test_nothing_to_compare_yet(tmp_path: Path) -> None:
    assert compare(tmp_path) is None
    write_evaluation(tmp_path, 0, np.array([1.0, 2.0]))
    assert compare(tmp_path) is None
    write_evaluation(tmp_path, 1, np.array([1.0, 2.0]), set_aside=(0, 1))
    assert compare(tmp_path) is None
    assert [point.version for point in curve(read_evaluations(tmp_path))] == [0]


def test_rewards_that_do_not_vary_have_no_gain(tmp_path: Path) -> None:
    write_evaluation(tmp_path, 0, np.array([1.0, 1.0]))
    write_evaluation(tmp_path, 1, np.array([2.0, 2.0]))
    change = compare(tmp_path)
    assert change is not None and change.difference == 1.0 and math.isnan(change.gain)


def test_the_curve_the_names_and_the_prompts(tmp_path: Path) -> None:
    write_evaluation(tmp_path, 0, np.arange(8.0))
    write_evaluation(tmp_path, 3, np.arange(8.0) * 2)
    evaluations = read_evaluations(tmp_path)
    points = curve(evaluations)
    assert [(p.version, p.count, p.mean) for p in points] == [(0, 8, 3.5), (3, 8, 7.0)]
    assert points[0].standard_error == pytest.approx(math.sqrt(6) / math.sqrt(8))
    assert reward_names(evaluations[0]) == ["compressibility"]
    rises = [after - before for _, before, after in by_prompt(evaluations)]
    assert rises == sorted(rises, reverse=True) and max(rises) == 7.0
