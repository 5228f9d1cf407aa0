import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.schema import LearnerConfig
from learner.advantages import Advantage, ByBatch, ByGroup, PerPrompt


def per_prompt(size: int, min_count: int) -> PerPrompt:
    return PerPrompt(LearnerConfig(tracker_size=size, tracker_min_count=min_count))


def test_advantages_against_numbers_computed_by_hand() -> None:
    advantage = per_prompt(size=4, min_count=3)
    # 1st batch: two cats and one dog are fewer than 3, so all use the batch's mean 3 and std sqrt(14/3)
    first = advantage(["cat", "cat", "dog"], np.array([1, 2, 6], np.float32))
    np.testing.assert_allclose(first, np.array([-2, -1, 3]) / (np.sqrt(14 / 3) + 1e-6), rtol=1e-6)
    # 2nd: cat remembers 1 2 3 (mean 2, std sqrt(2/3)), with the 3 of this batch; dog 6 10 is still below three,
    # so it takes the batch's mean 6.5 and std 3.5
    second = advantage(["dog", "cat"], np.array([10, 3], np.float32))
    np.testing.assert_allclose(second, [3.5 / (3.5 + 1e-6), 1 / (np.sqrt(2 / 3) + 1e-6)], rtol=1e-6)
    # 3rd: 1 is forgotten: cat has 2 3 7 8 (mean 5, std sqrt(6.5))
    third = advantage(["cat", "cat"], np.array([7, 8], np.float32))
    np.testing.assert_allclose(third, np.array([2, 3]) / (np.sqrt(6.5) + 1e-6), rtol=1e-6)
    assert advantage.state_dict() == {"cat": [2, 3, 7, 8], "dog": [6, 10]}
    assert advantage.stds() == {"cat": pytest.approx(np.sqrt(6.5)), "dog": 2}


def test_by_group_compares_the_batchs_pictures_of_a_prompt() -> None:
    """cats 1 2 6 have mean 3 and std sqrt(14/3); dogs 10 20 have 15 and 5; one horse has nothing beside it."""
    advantage = ByGroup(LearnerConfig())
    prompts, rewards = ["cat", "dog", "cat", "horse", "dog", "cat"], np.array([1, 10, 2, 7, 20, 6], np.float32)
    deviation = np.sqrt(14 / 3) + 1e-6
    expected = [-2 / deviation, -5 / (5 + 1e-6), -1 / deviation, 0, 5 / (5 + 1e-6), 3 / deviation]
    for _ in range(2):  # nothing is remembered
        made = advantage(prompts, rewards)
        np.testing.assert_allclose(made, expected, rtol=1e-6)
        assert made.dtype == np.float32 and made[3] == 0
    assert advantage.stds() == {} and advantage.state_dict() == {}


def test_by_batch_compares_all_pictures_whatever_their_prompts() -> None:
    """1 2 6 have mean 3 and std sqrt(14/3)."""
    advantage = ByBatch(LearnerConfig())
    for prompts in (["cat", "cat", "cat"], ["cat", "dog", "horse"]):
        made = advantage(prompts, np.array([1, 2, 6], np.float32))
        np.testing.assert_allclose(made, np.array([-2, -1, 3]) / (np.sqrt(14 / 3) + 1e-6), rtol=1e-6)
        assert made.dtype == np.float32
    assert advantage(["cat"], np.array([5], np.float32)).tolist() == [0]
    assert advantage.stds() == {} and advantage.state_dict() == {}


@pytest.mark.parametrize(
    "advantage",
    [per_prompt(8, 2), ByGroup(LearnerConfig()), ByBatch(LearnerConfig())],
    ids=lambda made: type(made).__name__,
)
def test_equal_rewards_have_no_advantage(advantage: Advantage) -> None:
    assert (advantage(["a"] * 4, np.full(4, -3.7, np.float32)) == 0).all()


@settings(deadline=None)  # a busy machine is no failure
@given(
    st.lists(
        st.lists(st.tuples(st.sampled_from("abc"), st.floats(-1e6, 1e6, width=32)), min_size=1, max_size=12),
        min_size=2,
        max_size=6,
    )
)
def test_what_is_remembered_goes_on_exactly_when_saved_as_json(batches: list[list[tuple[str, float]]]) -> None:
    whole, first = per_prompt(5, 3), per_prompt(5, 3)
    for batch in batches[:-1]:
        prompts, rewards = [p for p, _ in batch], np.array([r for _, r in batch], np.float32)
        whole(prompts, rewards)
        first(prompts, rewards)
    second = per_prompt(5, 3)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    prompts, rewards = [p for p, _ in batches[-1]], np.array([r for _, r in batches[-1]], np.float32)
    assert (whole(prompts, rewards) == second(prompts, rewards)).all()
    assert whole.state_dict() == second.state_dict()
