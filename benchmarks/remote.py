"""A reward that answers as a remote service does: after a while."""

import time

import numpy as np

from rewards.jpeg import JpegCompressibility


class Remote(JpegCompressibility):
    """Compressibility from a service that answers each request after `seconds`."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __call__(self, images: np.ndarray, prompts: list[str]) -> np.ndarray:
        time.sleep(self.seconds)
        return super().__call__(images, prompts)
