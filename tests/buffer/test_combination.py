"""Several rewards become one."""

import numpy as np

from buffer.rows import Combination

SCORES = {"beauty": np.array([4.0, 6.0, 9.0, np.nan], np.float32), "truth": np.array([1.0, 0.5, 0.0, 1.0], np.float32)}


def test_a_sum_is_weighted() -> None:
    combined = Combination({"beauty": 0.5, "truth": -2.0})(SCORES)
    np.testing.assert_allclose(combined, [0.0, 2.0, 4.5, np.nan])


def test_a_product_scales_each_to_its_range_and_weights_are_exponents() -> None:
    ranges = {"beauty": (2.0, 6.0), "truth": (0.0, 1.0)}
    combined = Combination({"beauty": 2.0, "truth": 1.0}, ranges)(SCORES)
    np.testing.assert_allclose(combined, [0.25, 0.5, 0.0, np.nan])


def test_what_is_not_weighted_does_not_count() -> None:
    np.testing.assert_allclose(Combination({"truth": 1.0})(SCORES), SCORES["truth"])
    ranges = {"beauty": (2.0, 6.0), "truth": (0.0, 1.0)}
    np.testing.assert_allclose(Combination({"beauty": 0.0, "truth": 1.0}, ranges)(SCORES)[:3], SCORES["truth"][:3])
