"""Where a worker's time goes.

Occupations that begin with "waiting" are waiting. Example: a sampler without an order, because the reward aesthetic is
not done, is "waiting for orders: scores of aesthetic" (buffer/watching.py has the reasons). What its calls of the
buffer take besides is "waiting for the buffer".
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
