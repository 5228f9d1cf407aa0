"""What the benchmarks say of growth, against lines and saw-teeth of which it is known."""

import numpy as np

from benchmarks.measure import growth

MINUTES = np.arange(0, 10, 1 / 60)
SAW_TOOTH = 1000.0 * (MINUTES % 0.53)  # MiB that come, and go when retention drops a batch
FALLS = np.flatnonzero(np.diff(SAW_TOOTH) < 0) + 1


def test_a_straight_line_has_its_slope_and_no_error() -> None:
    slope, error = growth(MINUTES, 5.0 + 0.25 * MINUTES, np.array([0, 100, 250, 400, 600]))
    assert abs(slope - 0.25) < 1e-9 and error < 1e-9


def test_a_saw_tooth_does_not_grow_and_a_leak_under_it_does() -> None:
    slope, error = growth(MINUTES, SAW_TOOTH, FALLS)
    assert abs(slope) < 3 * error < 5
    slope, error = growth(MINUTES, SAW_TOOTH + 10.0 * MINUTES, FALLS)
    assert slope > 3 * error
