"""Workers against the real buffer, in one process: what is handed in, what is charged to whom."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from buffer.schema import tensors_of
from common.clock import Clock
from rewards.base import NamedReward
from tests.buffer_toy import V0, buffer, roll_out, rolled_out, start
from workers.scorer import NothingScored, Scorer

Call = Callable[[np.ndarray, list[str]], np.ndarray]


def scorer(b: object, call: Call, name: str = "reward-size-0.0") -> Scorer:
    return Scorer(name, NamedReward("size", call), 8, b, Clock())  # type: ignore[arg-type]


def brightness(images: np.ndarray, prompts: list[str]) -> np.ndarray:
    return images.mean(axis=(1, 2, 3))


def test_a_picture_that_fails_is_set_aside_and_its_neighbours_are_scored(tmp_path: Path) -> None:
    b = buffer(tmp_path, batches=1)
    start(b)
    roll_out(b)
    failing = [True, False]

    def fails_first(images: np.ndarray, prompts: list[str]) -> np.ndarray:
        if (images == images[0]).all() and failing[0] and images[0, 0, 0, 0] == first:
            raise ValueError("no face")
        if not (images == images[0]).all():
            raise ValueError("one of these")
        return brightness(images, prompts)

    lease = b.lease("size", "looks")
    assert lease
    first = int(lease.table["image"].combine_chunks().to_numpy_ndarray()[0, 0, 0, 0])
    b.worker_died("looks", "nobody")
    worker = scorer(b, fails_first)
    while worker.step():
        pass
    assert sum(b.news().set_aside.values()) == 1 and b.news().orders["scored"] == 1
    assert next(iter(b.news().set_aside)).startswith("size: ValueError: no face")


def test_a_process_in_which_something_broke_for_good_is_left_for_a_new_one(tmp_path: Path) -> None:
    """It would set aside good pictures, order after order."""
    b = buffer(tmp_path, batches=1)
    start(b)
    while roll_out(b):
        pass

    def broken(images: np.ndarray, prompts: list[str]) -> np.ndarray:
        raise RuntimeError("the pool of helpers is gone")

    with pytest.raises(NothingScored, match=r"not one picture of b00000\.00 could be scored; a new process tries"):
        scorer(b, broken).step()
    b.worker_died("reward-size-0.0")
    worker = scorer(b, brightness, "reward-size-0.1")
    while worker.step():
        pass
    assert not b.news().set_aside and b.news().orders["scored"] == 4


def test_scores_are_handed_in_as_the_reward_gave_them(tmp_path: Path) -> None:
    b = buffer(tmp_path, batches=1)
    start(b)
    while roll_out(b):
        pass
    worker = scorer(b, brightness)
    assert [worker.step() for _ in range(5)] == [True] * 4 + [False]
    taken = b.take("learner-0.0")
    assert taken
    images = [tensors_of(rolled_out(b.plan.order(o), V0))["image"] for o in b.rules.sizes.batch_orders(0)]
    rewards = brightness(np.concatenate(images), []).astype(np.float32)
    np.testing.assert_array_equal(taken.table["reward"].to_numpy(), rewards)
    assert list(tensors_of(taken.table)) == ["latents", "timesteps", "log_probs"]  # the learner reads no pictures
