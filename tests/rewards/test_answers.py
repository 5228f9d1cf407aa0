"""What is accepted of a reward's answer is what is stored; what cannot be stored is refused, in a sentence."""

import decimal
import enum
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from rewards.base import BadAnswer, NamedReward, Scores, score_order, score_rows, try_out

TWO = np.zeros((2, 4, 4, 3), np.uint8)


def answers(*given: Any) -> NamedReward:
    """A reward that gives one answer after another."""
    left = iter(given)
    return NamedReward("mine", lambda images, prompts: next(left))


def with_column(cells: Any, key: str = "x") -> Scores:
    return Scores(np.zeros(2, np.float32), {key: cells})


# ---- scores

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
INTEGERS = [torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64, torch.uint64]


@pytest.mark.parametrize("dtype", [*FLOATS, *INTEGERS, torch.bool], ids=str)
def test_a_tensor_of_any_real_dtype_is_scores(dtype: torch.dtype) -> None:
    scores = answers(torch.tensor([0.0, 1.0]).to(dtype))(TWO, ["a", "b"]).scores
    assert scores.dtype == np.float32 and scores.tolist() == [0, 1]


class Foreign:
    """An array of another library, such as JAX."""

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return np.array([0, 1], np.float16)


@pytest.mark.parametrize(
    "scores",
    [
        [torch.tensor(0.0, dtype=torch.bfloat16), torch.tensor(1.0, dtype=torch.bfloat16)],
        (0, 1.0),
        [np.float16(0), np.float64(1)],
        np.array([0, 1], np.longdouble),
        np.ma.array([0.0, 1.0]),
        np.array([False, True]),
        Foreign(),
        torch.tensor([0.0, 1.0])[::1].expand(2),
    ],
    ids=lambda scores: type(scores).__name__,
)
def test_numbers_in_other_clothes_are_scores(scores: Any) -> None:
    assert answers(scores)(TWO, ["a", "b"]).scores.tolist() == [0, 1]


@pytest.mark.parametrize(
    "scores",
    [
        torch.zeros(2, dtype=torch.complex64),
        torch.tensor([1.0, float("nan")], dtype=torch.bfloat16),
        torch.tensor(1.0, dtype=torch.bfloat16),
        torch.zeros(2, device="meta"),
        torch.eye(2).to_sparse(),
        np.ma.array([1.0, 2.0], mask=[False, True]),
        np.ma.array([1, 2], mask=[False, True]),
        np.array([1.0, None]),
        np.array(["1", "2"]),
        np.array(["2020-01-01", "2020-01-02"], "datetime64[D]"),
        np.array([1, 2], "timedelta64[s]"),
        np.array([(1.0, 2), (3.0, 4)], [("a", float), ("b", int)]),
        [decimal.Decimal(1), decimal.Decimal(2)],
        [10**40, 1],
        [1e39, 1],
        {"a": 1.0, "b": 2.0},
        (np.zeros(2), {"caption": ["a", "b"]}),
        (score for score in (1.0, 2.0)),
        Scores(np.zeros(2), None),  # type: ignore[arg-type]
        Scores(np.zeros(2), [("x", [1, 2])]),  # type: ignore[arg-type]
    ],
    ids=lambda scores: f"{type(scores).__name__}-{getattr(scores, 'dtype', '')}",
)
def test_what_is_no_number_is_refused_in_a_sentence(scores: Any) -> None:
    with pytest.raises(BadAnswer, match="Reward mine gave") as caught:
        answers(scores)(TWO, ["a", "b"])
    assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)


# ---- columns


class Word(enum.StrEnum):
    cat = "cat"


@pytest.mark.parametrize(
    ("cells", "stored"),
    [
        (["a", None], ["a", None]),
        ([Word.cat, np.str_("b")], ["cat", "b"]),
        ([1, 2.5], [1.0, 2.5]),
        ([1, float("inf")], [1.0, float("inf")]),
        ([np.int8(1), np.float16(2)], [1.0, 2.0]),
        (np.array([1, 2], np.uint64), [1.0, 2.0]),
        (np.ma.array([1, 2], mask=[False, True]), [1.0, None]),
        (torch.tensor([1, 2], dtype=torch.bfloat16, requires_grad=False), [1.0, 2.0]),
        ([torch.tensor(1), torch.tensor(2.0)], [1.0, 2.0]),
        (pa.array(["a", "b"]), ["a", "b"]),
        (pa.chunked_array([["a"], ["b"]]), ["a", "b"]),
        ([np.True_, False], [True, False]),
        ([None, None], [None, None]),
        ([[], []], [[], []]),
        ([[], ["a"]], [[], ["a"]]),
        ([(1, 2), [3.0]], [[1.0, 2.0], [3.0]]),
        (np.array([[1, 2], [3, 4]]), [[1.0, 2.0], [3.0, 4.0]]),
        ([np.array([True]), None], [[True], None]),
        ([["a", None], []], [["a", None], []]),
        (["", "\x00\n"], ["", "\x00\n"]),
    ],
)
def test_cells_are_stored_as_plain_text_numbers_and_truth_values(cells: Any, stored: list) -> None:
    found = answers(with_column(cells))(TWO, ["a", "b"]).columns["x"]
    assert found == stored and all(type(a) is type(b) for a, b in zip(found, stored, strict=True))
    pa.array(found)


@pytest.mark.parametrize(
    "cells",
    [
        [1, "b"],
        [1, [2]],
        [True, 2],
        ["a", b"b"],
        [b"a", b"b"],
        [2**53 + 1, 1],
        [2**63, 1],
        [2**64, 1],
        ["\ud800", "a"],
        [["\ud800"], ["a"]],
        [[[1]], [[2]]],
        [{"a": 1}, {"a": 2}],
        [{}, {}],
        [{1}, {2}],
        [1j, 2j],
        [decimal.Decimal(1), decimal.Decimal(2)],
        [np.datetime64("2020-01-01"), np.datetime64("2020-01-02")],
        [float("nan"), "a"],
        [object(), object()],
        ["a"],
        "ab",
        b"ab",
        {"a": 1, "b": 2},
        {"a", "b"},
        None,
        3,
        np.array(3),
        (cell for cell in "ab"),
    ],
)
def test_cells_that_arrow_cannot_take_are_refused_in_a_sentence(cells: Any) -> None:
    with pytest.raises(BadAnswer, match=r"Reward mine .* column 'x'") as caught:
        answers(with_column(cells))(TWO, ["a", "b"])
    assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)


CELLS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.binary(max_size=2), st.just("\udfff"),
    st.decimals(allow_nan=False), st.dates(), st.just({}), st.sampled_from([np.float16(1), np.str_("a"), np.bool_(1)]),
)  # fmt: skip


@settings(deadline=None)
@given(st.lists(st.one_of(CELLS, st.lists(CELLS, max_size=2), st.lists(st.lists(CELLS, max_size=1))), max_size=3))
def test_what_passes_is_what_arrow_stores(cells: list) -> None:
    try:
        found = NamedReward("mine", lambda i, p: Scores(np.zeros(len(cells)), {"x": cells}))(
            np.zeros((len(cells), 4, 4, 3), np.uint8), ["a"] * len(cells)
        ).columns["x"]
    except BadAnswer as error:
        assert len(str(error)) < 500 and "\n" not in str(error)
        return
    kind = pa.array(found).type
    assert (kind.value_type if pa.types.is_list(kind) else kind) in (pa.null(), pa.string(), pa.float64(), pa.bool_())


@pytest.mark.parametrize(
    "key", ["score", "Score", "TRAJECTORY_ID", "", " x", "x\n", "a\x00b", "a\u200bb", "\ud800", "x" * 101, 3, None]
)
def test_a_column_that_cannot_have_its_name_is_refused(key: Any) -> None:
    with pytest.raises(BadAnswer, match="Reward mine names a column") as caught:
        answers(with_column([1, 2], key))(TWO, ["a", "b"])
    assert len(str(caught.value)) < 500 and str(caught.value).isprintable()


def test_two_columns_that_differ_in_case_only_are_refused() -> None:
    with pytest.raises(BadAnswer, match="two columns 'caption' and 'Caption'"):
        answers(Scores(np.zeros(2), {"caption": [1, 2], "Caption": [1, 2]}))(TWO, ["a", "b"])


# ---- from one answer to the next

CHANGES: dict[str, tuple[Any, Any, str]] = {
    "numbers, then text": ([1, 2], ["a", "b"], "put text into column 'x', where it put numbers before"),
    "text, then numbers": (["a", "b"], [0.5, 1], "put numbers into column 'x', where it put text before"),
    "truth values, then numbers": ([True, False], [1, 0], "put numbers into column 'x', where it put truth values"),
    "numbers, then lists": ([1, 2], [[1], [2]], "put lists of numbers into column 'x', where it put numbers before"),
    "lists of two kinds": ([[1], [2]], [["a"], []], "lists of text into column 'x', where it put lists of numbers"),
    "text, then empty lists": (["a", None], [[], []], "put lists into column 'x', where it put text before"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_reward_that_answers_in_another_kind_than_before_is_at_fault_itself(change: str) -> None:
    """No picture is: it is asked once more, alone, only where a picture may be to blame."""
    before, after, message = CHANGES[change]
    reward = answers(with_column(before), with_column([None, None]), with_column(after))
    for _ in range(2):
        assert score_order(reward, TWO, ["a", "b"], 2)[1] == {}
    with pytest.raises(UserError, match=message) as caught:
        score_order(reward, TWO, ["a", "b"], 2)
    assert "Reward mine" in str(caught.value) and len(str(caught.value)) < 500


def test_kinds_that_are_one_may_follow_one_another() -> None:
    given = ([1, 2], [0.5, None], [None, None], np.array([1, 2], np.uint8), [float("nan"), 3], torch.tensor([1, 2]))
    reward = answers(*map(with_column, given), Scores(np.zeros(2)), with_column([1, 2]))
    for _ in range(8):
        reward(TWO, ["a", "b"])
    lists = answers(*map(with_column, ([[], []], [None, None], [["a"], []], [[], [None]])))
    for _ in range(4):
        lists(TWO, ["a", "b"])


def test_slices_of_one_order_that_answer_in_two_kinds_are_the_rewards_fault() -> None:
    reward = answers(with_column([1, 2]), with_column(["a", "b"]))
    with pytest.raises(UserError, match="column 'x'"):
        score_order(reward, np.zeros((4, 4, 4, 3), np.uint8), ["a"] * 4, 2)


def test_a_column_that_comes_back_in_another_case_is_the_rewards_fault() -> None:
    reward = answers(with_column([1, 2], "Hits"), with_column([1, 2], "hits"))
    reward(TWO, ["a", "b"])
    with pytest.raises(UserError, match="column 'hits' that it named 'Hits' before"):
        reward(TWO, ["a", "b"])


def test_a_bad_answer_sets_no_kind() -> None:
    bad = Scores(np.array([np.nan, 0]), {"x": ["a", "b"]})
    reward = answers(bad, with_column([1, 2]))
    with pytest.raises(BadAnswer):
        reward(TWO, ["a", "b"])
    reward(TWO, ["a", "b"])


# ---- whose fault


class AcceleratorError(RuntimeError):
    """By the name of torch's."""


def fails(error: BaseException) -> Callable[..., Any]:
    def reward(images: np.ndarray, prompts: list[str]) -> None:
        raise error

    return reward


SICK = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    AcceleratorError("unspecified launch failure"),
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    OSError(12, "Cannot allocate memory"),
]


@pytest.mark.parametrize("error", SICK, ids=repr)
def test_a_sick_device_or_too_little_memory_is_no_pictures_fault(error: Exception) -> None:
    calls = []

    def reward(images: np.ndarray, prompts: list[str]) -> np.ndarray:
        calls.append(len(images))
        if len(calls) == 1:
            return np.zeros(len(images))
        try:
            raise error
        except Exception as cause:
            raise ValueError("wrapped by somebody's library") from cause

    with pytest.raises(ValueError, match="wrapped"):
        score_order(NamedReward("mine", reward), np.zeros((4, 4, 4, 3), np.uint8), ["a"] * 4, 2)
    assert calls == [2, 2], "it was asked again, on a device that cannot answer"


@pytest.mark.parametrize("error", SICK, ids=repr)
def test_a_sick_device_in_the_trial_is_not_answered_by_mending_the_reward(error: Exception) -> None:
    with pytest.raises(UserError, match="ran out of memory, or its device failed") as caught:
        try_out(NamedReward("mine", fails(error)), ["a cat"], (8, 8))
    assert "mend" not in str(caught.value) and "mine" in str(caught.value) and len(str(caught.value)) < 500


def test_a_reward_that_leaves_by_sys_exit_fails_like_any_other() -> None:
    with pytest.raises(UserError, match=r"Reward mine failed .* called sys.exit\(3\)"):
        try_out(NamedReward("mine", fails(SystemExit(3))), ["a cat"], (8, 8))
    _, failed = score_order(NamedReward("mine", fails(SystemExit("bye"))), TWO, ["a", "b"], 2)
    assert failed.keys() == {0, 1} and "sys.exit('bye')" in failed[0]


def test_a_sentence_stays_one_however_much_a_library_says() -> None:
    with pytest.raises(UserError) as caught:
        try_out(NamedReward("mine", fails(RuntimeError("line\n" * 1000))), ["a cat"], (8, 8))
    assert len(str(caught.value)) < 500 and str(caught.value).endswith("mend it and start again.")


# ---- alone


def test_a_picture_alone_scores_as_in_its_slice() -> None:
    """Also in an order's last slice, which is shorter, with a reward whose scores depend on the batch's shape."""
    images = np.arange(5, dtype=np.uint8).reshape(5, 1, 1, 1) * np.ones((1, 4, 4, 3), np.uint8)
    reward = NamedReward("mine", lambda i, p: i.mean(axis=(1, 2, 3)) + 100 * len(i))
    whole, _ = score_order(reward, images, ["p"] * 5, 2)
    assert whole.scores.tolist() == [200, 201, 202, 203, 104]
    alone, failed = score_rows(reward, images, ["p"] * 5, [4, 1], 2)
    assert not failed and alone.scores.tolist() == [104, 201]
