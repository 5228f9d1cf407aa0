"""What is measured of an evaluation's rows, against numbers worked out by hand."""

import numpy as np
import pyarrow as pa
import pytest

from evaluation.measures import diversity, measures

PROMPTS = ["a cat", "a dog", "a cat", "a dog", "a cat", "an owl"]


def test_two_pictures_of_a_prompt_are_as_far_apart_as_their_angle() -> None:
    """Of any length; a prompt that comes once has no distance, and a picture that was set aside none either."""
    embeddings = [[1.0, 0.0], [2.0, 0.0], [0.0, 3.0], [5.0, 0.0], None, [1.0, 1.0]]
    np.testing.assert_allclose(diversity(PROMPTS, embeddings), [1.0, 0.0], atol=1e-12)


def test_the_mean_is_over_all_pairs_of_a_prompt() -> None:
    rng = np.random.default_rng(0)
    embeddings = rng.normal(size=(5, 7))
    unit = [row / np.linalg.norm(row) for row in embeddings]
    pairs = [1 - unit[i] @ unit[j] for i in range(5) for j in range(i)]
    (found,) = diversity(["a cat"] * 5, embeddings.tolist())
    assert found == pytest.approx(np.mean(pairs))


def test_every_number_of_the_rows_is_measured_and_nothing_else() -> None:
    """Nothing of the third picture, which was set aside after one of its rewards had come."""
    rows = pa.table(
        {
            "prompt": ["a cat", "a cat", "a cat", "a dog"],
            "seed": pa.array([1, 2, 3, 4], pa.int64()),
            "age": pa.array([None, None, None, None], pa.int32()),
            "reward": pa.array([1.0, 2.0, None, 3.0], pa.float32()),
            "clip": pa.array([0.5, 0.5, 9.0, 0.25], pa.float32()),
            "clip.embedding": pa.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [1.0, 1.0]]),
            "judge": pa.array([None, None, None, None], pa.float32()),
            "judge.animal": pa.array([True, None, None, False]),
            "judge.words": ["a", "b", "c", "d"],
            "set_aside": pa.array([None, None, "hung", None]),
        }
    )
    found = {name: values.tolist() for name, values in measures(rows).items()}
    assert found == {
        "reward": [1.0, 2.0, 3.0],
        "clip": [0.5, 0.5, 0.25],
        "judge.animal": [1.0, 0.0],
        "diversity": [1.0],
    }


def test_a_number_that_is_none_says_nothing_of_the_others() -> None:
    """A reward may store NaN beside its score; a mean that is none would hide the measure from the guard."""
    rows = pa.table({"prompt": ["a", "b", "c"], "reward": [1.0] * 3, "clip": pa.array([1.0, 2.0, 3.0], pa.float32())})
    rows = rows.append_column("clip.margin", pa.array([0.5, float("nan"), float("inf")], pa.float32()))
    assert measures(rows)["clip.margin"].tolist() == [0.5]


def test_what_is_no_direction_has_no_distance() -> None:
    odd = [[1.0, 0.0], [0.0, 0.0], [0.0, 1.0], [float("nan"), 1.0], [1.0], None]
    np.testing.assert_allclose(diversity(["a cat"] * 6, odd), [1.0])
    for cells in (["a", "b"], [1.0, 2.0], [["a"], ["b"]]):
        rows = pa.table({"prompt": ["a", "a"], "reward": pa.array([1.0, 2.0]), "mine.embedding": cells})
        assert list(measures(rows)) == ["reward"]
