"""Calls of the buffer that wait through its restarts, and the clock by which a worker says where its time went.

Occupations that begin with "waiting" are waiting: "waiting for orders: scores of aesthetic" is a sampler's that has no
order because that reward is not done (buffer/waiting.py), "waiting for the buffer" what its calls take besides.
"""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError

WAIT_S = 5.0  # of one call for work; who waits longer asks again, which also tells how long it waited
PATIENCE_S = 300.0  # a buffer that restarts elsewhere replays its journal in seconds; its node or disk may take minutes


class BufferSilent(Exception):
    """The buffer lives, as far as anybody knows, and has not answered for PATIENCE_S seconds."""


def call(method: Any, *args: Any) -> Any:
    """The answer of an actor's method, asked again while the actor restarts. Raises BufferSilent.

    Every call of the buffer is idempotent, so asking twice is harmless; Ray's own retries are off, because they would
    hide a death that a worker has to know of.
    """
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            return ray.get(method.remote(*args), timeout=max(0.0, deadline - time.monotonic()))
        except GetTimeoutError as error:
            raise BufferSilent(f"the buffer has not answered for {PATIENCE_S:.0f} s") from error
        except ActorUnavailableError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def ask(clock: "Clock", what: str, method: Any, *args: Any) -> Any:
    """What the buffer hands out for this call (None: nothing in time). `clock` hears how long it waited and for whom;
    what the buffer itself took, and its restarts, is "waiting for the buffer"."""
    start = time.monotonic()
    answer, waited = call(method, *args, clock.read(), WAIT_S)
    for whom, seconds in waited.items():
        clock.seconds[f"waiting for {what}: {whom}"] += seconds
    clock.seconds["waiting for the buffer"] += max(0.0, time.monotonic() - start - sum(waited.values()))
    return answer


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
