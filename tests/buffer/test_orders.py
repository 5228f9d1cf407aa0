"""Plans: which prompt and which seeds a trajectory has."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from buffer.orders import Evaluation, Plan
from common.errors import UserError
from tests.buffer_toy import PLAN, buffer, start

PROMPTS = tuple(f"prompt {number}" for number in range(30))
ALONE = replace(PLAN, prompts=PROMPTS, batch_size=24, order_size=6, sets=())


def drawn(plan: Plan, batches: int = 4) -> list[tuple[str, int, int]]:
    """(prompt, seed, seed of the first noise) of every trajectory, by its id."""
    orders = [order for batch in range(batches) for order in plan.batch(batch)]
    ids = [one for order in orders for one in order.trajectory_ids]
    assert ids == list(range(len(ids)))
    return [row for order in orders for row in zip(order.prompts, order.seeds, order.noise_seeds, strict=True)]


@pytest.mark.parametrize("size", [2, 4, 8, 24])  # within orders and across them
def test_a_group_has_one_prompt_and_a_seed_for_each(size: int) -> None:
    alone, groups = drawn(ALONE), drawn(replace(ALONE, group_size=size))
    assert [seed for _, seed, _ in groups] == [seed for _, seed, _ in alone]
    assert [seed for _, seed, noise in groups if noise != seed] == []
    for row, (prompt, _, _) in enumerate(groups):
        assert prompt == alone[row - row % size][0]


def test_pictures_of_a_group_may_start_from_one_noise() -> None:
    plan = replace(ALONE, group_size=4, same_noise=True)
    rows = drawn(plan)
    assert [row[:2] for row in rows] == [row[:2] for row in drawn(replace(ALONE, group_size=4))]
    assert [noise for _, _, noise in rows] == [rows[row - row % 4][1] for row in range(len(rows))]
    sets = (replace(PLAN.sets[0], count=6),)
    (order,) = replace(plan, sets=sets).evaluation(Evaluation(0, sets[0].name))
    assert order.noise_seeds == order.seeds  # what is evaluated is as ever
    assert order == replace(ALONE, sets=sets).evaluation(Evaluation(0, sets[0].name))[0]


def test_another_size_of_groups_is_another_run(tmp_path: Path) -> None:
    b = buffer(tmp_path)
    start(b)
    b.close()
    with pytest.raises(UserError, match=r"groups None \(now 2, same_noise=False"):
        buffer(tmp_path, replace(PLAN, group_size=2))


def test_prompts_are_drawn_evenly() -> None:
    counts = np.unique([row[0] for row in drawn(ALONE, 100)], return_counts=True)[1]
    assert len(counts) == len(PROMPTS) and counts.min() > 40 and counts.max() < 120
