"""A reward that works on the two pictures of its trial and never again."""

import numpy as np


class Failing:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, images: np.ndarray, prompts: list[str]) -> np.ndarray:
        self.calls += 1
        if self.calls > 1:
            raise ValueError("no picture is good enough")
        return np.zeros(len(images), np.float32)
