"""Calls of the buffer that wait through its restarts, and the clock by which a worker says where its time went."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError

PATIENCE_S = 300.0  # a buffer that restarts elsewhere replays its journal in seconds; its node may take minutes


def call(method: Any, *args: Any) -> Any:
    """The answer of an actor's method, asked again while the actor restarts.

    Every call of the buffer is idempotent, so asking twice is harmless; Ray's own retries are off, because they would
    hide a death that a worker has to know of.
    """
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            return ray.get(method.remote(*args))
        except ActorUnavailableError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


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
