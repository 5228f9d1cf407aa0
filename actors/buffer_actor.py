"""The buffer as an actor: it forwards to `TrajectoryBuffer`, and lets callers wait for what is not there yet.

Versions are published with a reference to their weights, which the driver owns."""

import asyncio
import contextlib
import ctypes
import dataclasses
import signal
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from buffer.buffer import TrajectoryBuffer
from buffer.orders import Plan
from buffer.protocol import Charged, Claim, Lease, News, TakenBatch
from buffer.rows import Combination
from buffer.rules import Rules
from buffer.state import State
from buffer.watching import learner_waits_for, reward_waits_for, sampler_waits_for
from common.errors import RunStopped

T = TypeVar("T")
SIG_DFL = None  # as C has it: a null pointer
Seconds = dict[str, float]


class BufferActor:
    """One a run. Ray restarts it where there is room; it then replays the journal under the next epoch."""

    def __init__(self, run_dir: Path, plan: Plan, rules: Rules, combination: Combination) -> None:
        die_of_sigterm()
        self.buffer = TrajectoryBuffer(run_dir, plan, rules, combination)
        self.seconds: dict[str, Seconds] = {}
        self.dead: set[str] = set()  # a late call of a dead worker must not count
        self.stop: str | None = None
        self.draining = False
        self.changed = asyncio.Event()

    def __repr__(self) -> str:
        return "buffer"

    async def claim(self, worker: str, seconds: Seconds, wait_s: float) -> tuple[Claim | None, Seconds]:
        """The next order to roll out; None: nothing in time. The second part of the answer, as in `lease` and `take`:
        seconds that the call waited, by what it waited for."""
        self.seconds[worker] = seconds
        return await self._wait_for(
            lambda: None if self._refused(worker) else self.buffer.claim(worker), sampler_waits_for, wait_s
        )

    async def lease(self, reward: str, worker: str, seconds: Seconds, wait_s: float) -> tuple[Lease | None, Seconds]:
        self.seconds[worker] = seconds
        return await self._wait_for(
            lambda: None if worker in self.dead else self.buffer.lease(reward, worker), reward_waits_for, wait_s
        )

    async def take(self, group: str, rank: str, seconds: Seconds, wait_s: float) -> tuple[TakenBatch | None, Seconds]:
        """The next batch, for each rank of the group; while draining only the batch that one of them has already."""
        self.seconds[rank] = seconds

        def take() -> TakenBatch | None:
            taken = self.buffer.state.taken
            has_it = taken is not None and taken.worker == group
            return None if group in self.dead or (self.draining and not has_it) else self.buffer.take(group)

        return await self._wait_for(take, learner_waits_for, wait_s)

    async def get(self, method: str, *call: Any, **named: Any) -> Any:
        """What a method of the buffer says that changes nothing."""
        return getattr(self.buffer, method)(*call, **named)

    async def do(self, method: str, *call: Any, **named: Any) -> Any:
        """What a method of the buffer answers, and it wakes all who wait; None where the run stops instead."""
        return self._change(lambda: getattr(self.buffer, method)(*call, **named))

    async def worker_died(self, worker: str, charged: Charged) -> None:
        self.dead.add(worker)
        self._change(lambda: self.buffer.worker_died(worker, charged))

    async def drain(self) -> None:
        """From now on nothing new is claimed or taken; what is under way is finished. A restart forgets it."""
        self.draining = True

    async def poll(self, wait_s: float) -> News:
        """The news, after `wait_s` seconds or as soon as something changes."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.changed.wait(), wait_s)
        news = self.buffer.news()
        return dataclasses.replace(news, stop=self.stop or news.stop, seconds=self.seconds, draining=self.draining)

    def _refused(self, worker: str) -> bool:
        return self.draining or worker in self.dead

    def _change(self, action: Callable[[], T]) -> T | None:
        """Does `action` and wakes all who wait. A reason to stop is kept for the driver, which ends the run."""
        try:
            return action()
        except RunStopped as reason:
            self.stop = self.stop or str(reason)
            return None
        finally:
            self._wake()

    def _wake(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()

    async def _wait_for(
        self, attempt: Callable[[], T | None], why: Callable[[Rules, State], str], wait_s: float
    ) -> tuple[T | None, Seconds]:
        """What `attempt` gives as soon as it gives something, or None after `wait_s` seconds or when the run stops; and
        the seconds that it waited, by the reason that `why` names at each moment. An answer to one wakes the others:
        what they wait for may be another thing now."""
        clock = asyncio.get_running_loop().time
        deadline = clock() + wait_s
        waited: Seconds = defaultdict(float)
        while self.stop is None:
            changed = self.changed
            try:
                if (result := attempt()) is not None:
                    self._wake()
                    return result, waited
            except RunStopped as reason:
                self.stop = str(reason)
                break
            whom, since = why(self.buffer.rules, self.buffer.state), clock()
            try:
                await asyncio.wait_for(changed.wait(), deadline - since)
            except TimeoutError:
                break
            finally:
                waited[whom] += clock() - since
        return None, waited


def die_of_sigterm() -> None:
    """Lets SIGTERM end the process at once, which loses nothing. Ray's handler waits until all calls of an asynchronous
    actor are finished; here they wait for one another, and the actor would neither work nor end.

    By C's function: Python's works in the main thread only, and Ray makes the actor in another.
    """
    ctypes.CDLL(None).signal(signal.SIGTERM, SIG_DFL)
