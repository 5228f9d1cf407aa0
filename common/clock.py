"""Where a worker's time goes.

Occupations that begin with "waiting" are waiting: "waiting for orders: scores of aesthetic" is a sampler's that has no
order because that reward is not done (buffer/waiting.py), "waiting for the buffer" what its calls take besides.
"""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Seconds that a worker spent on each of its occupations, since it started."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def on(self, occupation: str) -> Iterator[None]:
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds[occupation] += time.monotonic() - start

    def read(self) -> dict[str, float]:
        return dict(self.seconds)
