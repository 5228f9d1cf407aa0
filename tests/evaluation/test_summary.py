"""Before and after over fixed pairs, against numbers worked out by hand."""

import json
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from buffer.run_folder import RunFolder
from evaluation.measures import reward_names
from evaluation.summary import by_prompt, compare, curve, in_words, outcome
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
    assert [point.version for point in curve(RunFolder(tmp_path).evaluations)] == [0]


def test_rewards_that_do_not_vary_have_no_gain(tmp_path: Path) -> None:
    write_evaluation(tmp_path, 0, np.array([1.0, 1.0]))
    write_evaluation(tmp_path, 1, np.array([2.0, 2.0]))
    change = compare(tmp_path)
    assert change is not None and change.difference == 1.0 and math.isnan(change.gain)


def test_the_curve_the_names_and_the_prompts(tmp_path: Path) -> None:
    write_evaluation(tmp_path, 0, np.arange(8.0))
    write_evaluation(tmp_path, 3, np.arange(8.0) * 2)
    evaluations = RunFolder(tmp_path).evaluations
    points = curve(evaluations)
    assert [(p.version, p.count, p.mean) for p in points] == [(0, 8, 3.5), (3, 8, 7.0)]
    assert points[0].standard_error == pytest.approx(math.sqrt(6) / math.sqrt(8))
    assert reward_names(evaluations[0]) == ["compressibility"]
    rises = [after - before for _, before, after in by_prompt(evaluations)]
    assert rises == sorted(rises, reverse=True) and max(rises) == 7.0


@pytest.mark.parametrize("value", [1.0, 0.1, -3.3, 1e-3])
def test_rewards_that_do_not_vary_have_a_spread_of_exactly_0(value: float, tmp_path: Path) -> None:
    """The mean of three times 0.1 is not 0.1, and so their deviations from it are not 0."""
    for count in (3, 7):
        write_evaluation(tmp_path, 0, np.full(count, value))
        write_evaluation(tmp_path, 1, np.full(count, value) + np.arange(count))
        change = compare(tmp_path)
        assert change is not None and change.before_std == 0 and math.isnan(change.gain)


def test_the_result_is_a_sentence(tmp_path: Path) -> None:
    write_evaluation(tmp_path, 0, np.array([1.0, 2.0, 3.0]))
    write_evaluation(tmp_path, 9, np.array([2.0, 3.0, 5.0]))
    assert in_words(compare(tmp_path)) == (
        "finished: over 3 fixed pairs of prompt and seed the mean reward went from 2.0000 to 3.3333, by +1.3333 with a "
        "standard error of 0.3333: +1.33 standard deviations of the rewards before"
    )


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        ([1.0, 1.0], [2.0, 3.0], "the rewards before did not vary"),
        ([0.1, 0.1, 0.1], [0.1, 0.1, 0.1], "the rewards before did not vary"),
        ([1.0], [2.0], "over 1 fixed pair of prompt and seed"),
        ([1.0], [2.0], "from a single pair no error can be given"),
        ([1.0, 2.0], [1.0 - 1e-9, 2.0], "with a standard error of 0.0000: less than 0.01 standard deviations"),
    ],
)
def test_numbers_that_are_not_there_are_said_in_words(
    before: list[float], after: list[float], says: str, tmp_path: Path
) -> None:
    write_evaluation(tmp_path, 0, np.array(before))
    write_evaluation(tmp_path, 1, np.array(after))
    sentence = in_words(compare(tmp_path))
    assert says in sentence and "nan" not in sentence and "-0.00" not in sentence


@pytest.mark.parametrize(
    ("best", "says"),
    [
        (None, []),
        (9, []),
        (3, ["version 3, the best, in {}: over 3 fixed pairs of prompt and seed the mean reward went from 2.0000 to"]),
        (0, ["version 0, the best, in {}: no later one is better"]),
    ],
)
def test_where_the_best_version_is_not_the_last_both_are_spoken_of(
    best: int | None, says: list[str], tmp_path: Path
) -> None:
    for version in (0, 3, 9):
        write_evaluation(tmp_path, version, np.arange(3.0) + 1 + version % 9)
    if best is not None:
        (tmp_path / "lora_best").mkdir()
        (tmp_path / "lora_best" / "version.json").write_text(json.dumps({"version": best}))
    last, *others = outcome(tmp_path, "stopped").splitlines()
    assert last.startswith("stopped: over 3 fixed pairs") and len(others) == len(says)
    for line, start in zip(others, says, strict=True):
        assert line.startswith(start.format(tmp_path / "lora_best"))


def test_a_run_without_two_evaluations_has_its_sentence_too(tmp_path: Path) -> None:
    assert "no evaluation to compare" in in_words(None)


def test_the_version_of_an_evaluation_is_known_where_no_row_has_one(tmp_path: Path) -> None:
    """Of an order that was set aside before anybody rolled it out, rows are of no version."""
    write_evaluation(tmp_path, 4, np.array([1.0, 2.0]), set_aside=(0, 1))
    (path,) = (tmp_path / "evaluation").glob("*.parquet")
    table = pq.read_table(path)
    column = table.schema.get_field_index("policy_version")
    pq.write_table(table.set_column(column, "policy_version", pa.nulls(2, pa.int32())), path)
    assert list(RunFolder(tmp_path).evaluations) == [4]
    assert compare(tmp_path) is None
