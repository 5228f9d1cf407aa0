"""Advantages: how much better a picture is than others, in standard deviations of theirs.

The door for a new one, built in or the user's own: docs/extending.md has a whole example.
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from common.errors import UserError, quoted
from conf.schema import LearnerConfig

Name = TypeVar("Name", bound=Hashable)
TINY = 1e-6  # where all rewards are equal, no picture is better than another


class Advantage(ABC):
    """From a batch's rewards to what its pictures' actions are weighted by. The update clips it (advantage_clip)."""

    def __init__(self, config: LearnerConfig) -> None:
        self.config = config

    @abstractmethod
    def __call__(self, prompts: Sequence[str], rewards: np.ndarray, groups: np.ndarray) -> np.ndarray:
        """float32 [B] of B prompts and float32 [B] rewards. Rows come by ascending trajectory id.

        groups: int64 [B], equal for pictures of one group: those of one prompt, or with buffer.group_size those that
        were drawn together.
        """

    def stds(self) -> dict[str, float]:
        """Of each prompt's rewards, as far as they are known: for people."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What a recovery point has to hold, as plain JSON."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027, as most keep nothing
        """Goes on from a `state_dict`."""


class PerPrompt(Advantage):
    """Remembers the last learner.tracker_size rewards of each prompt and normalises by their mean and deviation.

        A = (r - mean) / (std + 1e-6)

    As in the public code of Black et al. 2023: a prompt's new rewards are remembered before its mean is taken, and a
    prompt of which fewer than learner.tracker_min_count are remembered uses mean and deviation of the whole batch. The
    order of rows says what is forgotten first.

    Example: with tracker_size=32 and tracker_min_count=16, ["a cat", "a dog"] and rewards [1.0, 3.0] give [-1, 1].
    """

    def __init__(self, config: LearnerConfig) -> None:
        super().__init__(config)
        self._rewards: dict[str, deque[float]] = {}

    def __call__(self, prompts: Sequence[str], rewards: np.ndarray, groups: np.ndarray) -> np.ndarray:
        values = rewards.astype(np.float64)
        advantages = np.empty(len(values))
        for prompt, rows in _rows_of(prompts).items():
            remembered = self._rewards.setdefault(prompt, deque(maxlen=self.config.tracker_size))
            remembered.extend(values[rows].tolist())
            reference = values if len(remembered) < self.config.tracker_min_count else np.array(remembered)
            advantages[rows] = _normalised(values[rows], reference)
        return advantages.astype(np.float32)

    def stds(self) -> dict[str, float]:
        return {prompt: float(np.std(values)) for prompt, values in self._rewards.items() if len(values) > 1}

    def state_dict(self) -> dict[str, list[float]]:
        return {prompt: list(values) for prompt, values in self._rewards.items()}

    def load_state_dict(self, state: Mapping[str, Sequence[float]]) -> None:
        size = self.config.tracker_size
        self._rewards = {prompt: deque(values, maxlen=size) for prompt, values in state.items()}


class ByGroup(Advantage):
    """Compares the pictures of a group with one another, as GRPO does (Shao et al. 2024, section 4.1).

        A = (r - mean of the group) / (std + 1e-6)

    A picture that is alone has nothing to be compared with: its advantage is 0.

    std: "group", of its own group, or "batch", of r - mean over the whole batch: a group of which all pictures are
    much alike then says little, and a small group's own deviation is not taken for the truth.
    """

    def __init__(self, config: LearnerConfig, std: str = "group") -> None:
        super().__init__(config)
        if std not in ("group", "batch"):
            raise UserError(f"std={quoted(std)} is none of group, batch: choose one.")
        self.std = std

    def __call__(self, prompts: Sequence[str], rewards: np.ndarray, groups: np.ndarray) -> np.ndarray:
        values = rewards.astype(np.float64)
        deviations, stds = np.empty(len(values)), np.empty(len(values))
        for rows in _rows_of(groups.tolist()).values():
            deviations[rows], stds[rows] = values[rows] - values[rows].mean(), values[rows].std()
        if self.std == "batch":
            stds[:] = np.sqrt(np.mean(deviations**2))
        return (deviations / (stds + TINY)).astype(np.float32)


class ByBatch(Advantage):
    """Normalises among all pictures of the batch, whatever their prompts."""

    def __call__(self, prompts: Sequence[str], rewards: np.ndarray, groups: np.ndarray) -> np.ndarray:
        values = rewards.astype(np.float64)
        return _normalised(values, values).astype(np.float32)


def furthest(advantages: np.ndarray, count: int) -> np.ndarray:
    """int64 [count], ascending: the rows whose advantages are furthest from 0; of equals the first."""
    return np.sort(np.argsort(-np.abs(advantages), kind="stable")[:count])


def _rows_of(names: Sequence[Name]) -> dict[Name, list[int]]:
    rows: dict[Name, list[int]] = {}
    for row, name in enumerate(names):
        rows.setdefault(name, []).append(row)
    return rows


def _normalised(values: np.ndarray, reference: np.ndarray) -> np.ndarray:
    normalised: np.ndarray = (values - reference.mean()) / (reference.std() + TINY)
    return normalised
