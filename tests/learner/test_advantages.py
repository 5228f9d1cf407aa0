import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.schema import LearnerConfig
from learner.advantages import Advantage, ByBatch, ByGroup, PerPrompt, furthest
from learner.batch import groups_of

NO_GROUPS = np.empty(0, np.int64)  # for those that do not look at them


def per_prompt(size: int, min_count: int) -> PerPrompt:
    return PerPrompt(LearnerConfig(tracker_size=size, tracker_min_count=min_count))


def test_advantages_against_numbers_computed_by_hand() -> None:
    advantage = per_prompt(size=4, min_count=3)
    # 1st batch: two cats and one dog are fewer than 3, so all use the batch's mean 3 and std sqrt(14/3)
    first = advantage(["cat", "cat", "dog"], np.array([1, 2, 6], np.float32), NO_GROUPS)
    np.testing.assert_allclose(first, np.array([-2, -1, 3]) / (np.sqrt(14 / 3) + 1e-6), rtol=1e-6)
    # 2nd: cat remembers 1 2 3 (mean 2, std sqrt(2/3)), with the 3 of this batch; dog 6 10 is still below three,
    # so it takes the batch's mean 6.5 and std 3.5
    second = advantage(["dog", "cat"], np.array([10, 3], np.float32), NO_GROUPS)
    np.testing.assert_allclose(second, [3.5 / (3.5 + 1e-6), 1 / (np.sqrt(2 / 3) + 1e-6)], rtol=1e-6)
    # 3rd: 1 is forgotten: cat has 2 3 7 8 (mean 5, std sqrt(6.5))
    third = advantage(["cat", "cat"], np.array([7, 8], np.float32), NO_GROUPS)
    np.testing.assert_allclose(third, np.array([2, 3]) / (np.sqrt(6.5) + 1e-6), rtol=1e-6)
    assert advantage.state_dict() == {"cat": [2, 3, 7, 8], "dog": [6, 10]}
    assert advantage.stds() == {"cat": pytest.approx(np.sqrt(6.5)), "dog": 2}


def test_by_group_compares_the_pictures_of_a_group() -> None:
    """1 2 6 have mean 3 and std sqrt(14/3), 10 20 have 15 and 5, 7 has nothing beside it; the deviations of all six
    have the mean square (14 + 50) / 6."""
    groups, rewards = np.array([4, 5, 4, 6, 5, 4]), np.array([1, 10, 2, 7, 20, 6], np.float32)
    deviations, own, batch = np.array([-2, -5, -1, 0, 5, 3]), np.sqrt(14 / 3), np.sqrt(64 / 6)
    stds = {"group": np.array([own, 5, own, 0, 5, own]), "batch": np.full(6, batch)}
    for std, expected in stds.items():
        advantage = ByGroup(LearnerConfig(), std)
        for _ in range(2):  # nothing is remembered
            made = advantage(["cat"] * 6, rewards, groups)
            np.testing.assert_allclose(made, deviations / (expected + 1e-6), rtol=1e-6)
            assert made.dtype == np.float32 and made[3] == 0
        assert advantage.stds() == {} and advantage.state_dict() == {}


def test_a_group_is_what_was_drawn_together_or_else_a_prompts_pictures() -> None:
    prompts, ids = ["cat", "dog", "cat", "cat", "cat"], np.array([8, 9, 10, 13, 15])
    assert groups_of(ids, prompts, 1).tolist() == [0, 1, 0, 0, 0]
    assert groups_of(ids, prompts, 4).tolist() == [2, 2, 2, 3, 3]


def test_the_furthest_from_0_are_trained_on_of_equals_the_first() -> None:
    advantages = np.array([0.1, -2, 2, 0.5, -0.5], np.float32)
    chosen = [furthest(advantages, count).tolist() for count in range(1, 6)]
    assert chosen == [[1], [1, 2], [1, 2, 3], [1, 2, 3, 4], [0, 1, 2, 3, 4]]


def test_by_batch_compares_all_pictures_whatever_their_prompts() -> None:
    """1 2 6 have mean 3 and std sqrt(14/3)."""
    advantage = ByBatch(LearnerConfig())
    for prompts in (["cat", "cat", "cat"], ["cat", "dog", "horse"]):
        made = advantage(prompts, np.array([1, 2, 6], np.float32), NO_GROUPS)
        np.testing.assert_allclose(made, np.array([-2, -1, 3]) / (np.sqrt(14 / 3) + 1e-6), rtol=1e-6)
        assert made.dtype == np.float32
    assert advantage(["cat"], np.array([5], np.float32), NO_GROUPS).tolist() == [0]
    assert advantage.stds() == {} and advantage.state_dict() == {}


@pytest.mark.parametrize(
    "advantage",
    [per_prompt(8, 2), ByGroup(LearnerConfig()), ByGroup(LearnerConfig(), "batch"), ByBatch(LearnerConfig())],
    ids=lambda made: type(made).__name__,
)
def test_equal_rewards_have_no_advantage(advantage: Advantage) -> None:
    assert (advantage(["a"] * 4, np.full(4, -3.7, np.float32), np.array([0, 0, 1, 1])) == 0).all()


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
        whole(prompts, rewards, NO_GROUPS)
        first(prompts, rewards, NO_GROUPS)
    second = per_prompt(5, 3)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    prompts, rewards = [p for p, _ in batches[-1]], np.array([r for _, r in batches[-1]], np.float32)
    assert (whole(prompts, rewards, NO_GROUPS) == second(prompts, rewards, NO_GROUPS)).all()
    assert whole.state_dict() == second.state_dict()
