"""Advantages: how much better a picture is than others of the same prompt."""

from collections import deque
from collections.abc import Mapping, Sequence

import numpy as np


class PerPromptTracker:
    """Remembers the last `size` rewards of each prompt and normalises by their mean and standard deviation.

        A = (r - mean) / (std + 1e-6)

    As in the public code of Black et al. 2023: a prompt's new rewards are remembered before its mean
    is taken, and a prompt of which fewer than `min_count` are remembered uses mean and std of the whole batch.

    Example: PerPromptTracker(size=32, min_count=16).advantages(["a cat", "a dog"], np.array([1.0, 3.0]))
    gives [-1, 1].
    """

    def __init__(self, size: int, min_count: int) -> None:
        self.size = size
        self.min_count = min_count
        self._rewards: dict[str, deque[float]] = {}

    def advantages(self, prompts: Sequence[str], rewards: np.ndarray) -> np.ndarray:
        """float32 [B] of B prompts and float32 [B] rewards, which are remembered.

        The order of rows says what is forgotten first, so it has to be the same in every repetition of a run.
        """
        values = rewards.astype(np.float64)
        rows_of: dict[str, list[int]] = {}
        for row, prompt in enumerate(prompts):
            rows_of.setdefault(prompt, []).append(row)
        advantages = np.empty(len(values))
        for prompt, rows in rows_of.items():
            remembered = self._rewards.setdefault(prompt, deque(maxlen=self.size))
            remembered.extend(values[rows].tolist())
            reference = values if len(remembered) < self.min_count else np.array(remembered)
            advantages[rows] = (values[rows] - reference.mean()) / (reference.std() + 1e-6)
        return advantages.astype(np.float32)

    def stds(self) -> dict[str, float]:
        """Standard deviation of each prompt's remembered rewards, where there are two or more."""
        return {prompt: float(np.std(values)) for prompt, values in self._rewards.items() if len(values) > 1}

    def state_dict(self) -> dict[str, list[float]]:
        """The remembered rewards by prompt, oldest first: plain JSON, and exact in it."""
        return {prompt: list(values) for prompt, values in self._rewards.items()}

    def load_state_dict(self, state: Mapping[str, Sequence[float]]) -> None:
        self._rewards = {prompt: deque(values, maxlen=self.size) for prompt, values in state.items()}
