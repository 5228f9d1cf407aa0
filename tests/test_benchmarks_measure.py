"""What the benchmarks say of growth, against lines and saw-teeth of which it is known."""

import numpy as np

from benchmarks.measure import growth

MINUTES = np.arange(0, 10, 1 / 60)
SAW_TOOTH = 1000.0 * (MINUTES % 0.53)  # MiB that come, and go when retention drops a batch


def test_a_straight_line_has_its_slope_and_no_error() -> None:
    slope, error = growth(MINUTES.tolist(), (5.0 + 0.25 * MINUTES).tolist())
    assert abs(slope - 0.25) < 1e-9 and error < 1e-9


def test_a_saw_tooth_does_not_grow_and_a_leak_under_it_does() -> None:
    slope, error = growth(MINUTES.tolist(), SAW_TOOTH.tolist())
    assert abs(slope) < 3 * error
    slope, error = growth(MINUTES.tolist(), (SAW_TOOTH + 50.0 * MINUTES).tolist())
    assert slope > 3 * error
