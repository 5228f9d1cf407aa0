import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.advantages import PerPromptTracker


def test_advantages_against_numbers_computed_by_hand() -> None:
    tracker = PerPromptTracker(size=4, min_count=3)
    # 1st batch: two cats and one dog are fewer than 3, so all use the batch's mean 3 and std sqrt(14/3)
    first = tracker.advantages(["cat", "cat", "dog"], np.array([1, 2, 6], np.float32))
    np.testing.assert_allclose(first, np.array([-2, -1, 3]) / (np.sqrt(14 / 3) + 1e-6), rtol=1e-6)
    # 2nd: cat remembers 1 2 3 (mean 2, std sqrt(2/3)), with the 3 of this batch; dog 6 10 is still below three,
    # so it takes the batch's mean 6.5 and std 3.5
    second = tracker.advantages(["dog", "cat"], np.array([10, 3], np.float32))
    np.testing.assert_allclose(second, [3.5 / (3.5 + 1e-6), 1 / (np.sqrt(2 / 3) + 1e-6)], rtol=1e-6)
    # 3rd: 1 is forgotten: cat has 2 3 7 8 (mean 5, std sqrt(6.5))
    third = tracker.advantages(["cat", "cat"], np.array([7, 8], np.float32))
    np.testing.assert_allclose(third, np.array([2, 3]) / (np.sqrt(6.5) + 1e-6), rtol=1e-6)
    assert tracker.state_dict() == {"cat": [2, 3, 7, 8], "dog": [6, 10]}
    assert tracker.stds() == {"cat": pytest.approx(np.sqrt(6.5)), "dog": 2}


def test_equal_rewards_have_no_advantage() -> None:
    tracker = PerPromptTracker(size=8, min_count=2)
    assert (tracker.advantages(["a"] * 4, np.full(4, -3.7, np.float32)) == 0).all()


@settings(deadline=None)  # a busy machine is no failure
@given(
    st.lists(
        st.lists(st.tuples(st.sampled_from("abc"), st.floats(-1e6, 1e6, width=32)), min_size=1, max_size=12),
        min_size=2,
        max_size=6,
    )
)
def test_a_tracker_saved_as_json_goes_on_exactly(batches: list[list[tuple[str, float]]]) -> None:
    whole, first = PerPromptTracker(5, 3), PerPromptTracker(5, 3)
    for batch in batches[:-1]:
        prompts, rewards = [p for p, _ in batch], np.array([r for _, r in batch], np.float32)
        whole.advantages(prompts, rewards)
        first.advantages(prompts, rewards)
    second = PerPromptTracker(5, 3)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    prompts, rewards = [p for p, _ in batches[-1]], np.array([r for _, r in batches[-1]], np.float32)
    assert (whole.advantages(prompts, rewards) == second.advantages(prompts, rewards)).all()
    assert whole.state_dict() == second.state_dict()
