"""How several rewards become the one number that is trained on."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Combination:
    """The weighted sum of rewards, or the product of rewards that were scaled to 0..1.

    A product is high only where all of its parts are: what fails the prompt gets nothing for being beautiful.

    Example: Combination({"aesthetic": 1.0, "vqa": 2.0}, ranges={"aesthetic": (3.0, 7.0), "vqa": (0.0, 1.0)})
    """

    weights: Mapping[str, float]  # by reward; a product's weights are exponents
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)  # for a product: what becomes 0 and 1

    def __call__(self, scores: Mapping[str, np.ndarray]) -> np.ndarray:
        """float64 [B] of each reward's scores [B]; nan where one of them is."""
        columns = {name: np.asarray(scores[name], np.float64) for name in self.weights}
        if not self.ranges:
            return np.asarray(np.sum([weight * columns[name] for name, weight in self.weights.items()], axis=0))
        scaled = {name: (columns[name] - low) / (high - low) for name, (low, high) in self.ranges.items()}
        return np.asarray(np.prod([scaled[name].clip(0, 1) ** weight for name, weight in self.weights.items()], axis=0))
