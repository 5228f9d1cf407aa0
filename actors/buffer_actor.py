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

import numpy as np
import pyarrow as pa
import ray

from buffer.buffer import TrajectoryBuffer
from buffer.orders import Plan, Version
from buffer.protocol import Claim, Lease, News, TakenBatch
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
        self.dead: set[str] = set()  # a call that a worker sent before it died must not bring it back
        self.stop: str | None = None
        self.draining = False
        self.changed = asyncio.Event()

    def __repr__(self) -> str:
        return "buffer"

    async def claim(self, worker: str, seconds: Seconds, wait_s: float) -> tuple[Claim | None, Seconds]:
        """The next order to roll out; None: nothing in time.

        As of `lease` and `take`, the second answer is how long the call waited here, by what it waited for.
        """
        self.seconds[worker] = seconds
        return await self._wait_for(
            lambda: None if self._refused(worker) else self.buffer.claim(worker), sampler_waits_for, wait_s
        )

    async def add(self, order_id: str, version: Version, table: pa.Table) -> bool:
        return bool(self._change(lambda: self.buffer.add(order_id, version, table)))

    async def prompts(self) -> tuple[str, ...]:
        return self.buffer.prompts()

    async def order_failed(self, order_id: str, worker: str, message: str) -> None:
        self._change(lambda: self.buffer.order_failed(order_id, worker, message))

    async def lease(self, reward: str, worker: str, seconds: Seconds, wait_s: float) -> tuple[Lease | None, Seconds]:
        self.seconds[worker] = seconds
        return await self._wait_for(
            lambda: None if worker in self.dead else self.buffer.lease(reward, worker), reward_waits_for, wait_s
        )

    async def add_scores(self, reward: str, order_id: str, table_digest: str, table: pa.Table) -> bool:
        return bool(self._change(lambda: self.buffer.add_scores(reward, order_id, table_digest, table)))

    async def pictures_failed(
        self, reward: str, order_id: str, table_digest: str, worker: str, reasons: dict[int, str]
    ) -> None:
        self._change(lambda: self.buffer.pictures_failed(reward, order_id, table_digest, worker, reasons))

    async def take(self, group: str, rank: str, seconds: Seconds, wait_s: float) -> tuple[TakenBatch | None, Seconds]:
        """The next batch, for each rank of the group; while draining only the batch that one of them has already."""
        self.seconds[rank] = seconds

        def take() -> TakenBatch | None:
            taken = self.buffer.state.taken
            has_it = taken is not None and taken.worker == group
            return None if group in self.dead or (self.draining and not has_it) else self.buffer.take(group)

        return await self._wait_for(take, learner_waits_for, wait_s)

    async def trying_alone(self, worker: str, trajectory_id: int | None) -> None:
        self._change(lambda: self.buffer.trying_alone(worker, trajectory_id))

    async def initial_recovery_point(self) -> str:
        return self.buffer.initial_recovery_point()

    async def trained(self, batch: int, version: Version, recovery_point: str, parquet: str) -> str | None:
        """The recovery point that counts; None when the run stops instead."""
        return self._change(lambda: self.buffer.trained(batch, version, recovery_point, parquet))

    async def current(self) -> tuple[Version, str] | None:
        return self.buffer.current()

    async def publish(self, version: Version, weights: list[ray.ObjectRef[Any]]) -> None:
        """`weights` is a list of one reference, so that Ray passes the reference and not its content."""
        self._change(lambda: self.buffer.publish(version, weights))

    async def worker_died(self, worker: str, blameless: bool = False) -> None:
        """blameless: it was ended on purpose, or its node died; that says nothing against what it worked on."""
        self.dead.add(worker)
        self._change(lambda: self.buffer.worker_died(worker, node_lives=not blameless))

    async def evaluation_missed(self, version: int, why: str) -> None:
        self._change(lambda: self.buffer.evaluation_missed(version, why))

    async def drain(self) -> None:
        """From now on nothing new is claimed or taken; what is under way is finished. A restart forgets it."""
        self.draining = True

    async def evaluation(self, version: int, pictures: int) -> tuple[pa.Table, dict[int, np.ndarray] | None]:
        return self.buffer.evaluation(version, pictures)

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
        """What `attempt` gives as soon as it gives something, None after `wait_s` seconds or once the run stops; and
        how long that took, by what `why` says of each moment. Who gets something wakes the others: they still wait, but
        perhaps for somebody else."""
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
    """What SIGTERM does to any process: end it. Ray's own handler lets an asynchronous actor finish its calls first,
    which wait for one another, and so leaves one that neither lives nor dies. Nothing is lost by a sudden end.

    By C's function, because Python's own works in a process's main thread only, and Ray makes the actor in another.
    """
    ctypes.CDLL(None).signal(signal.SIGTERM, SIG_DFL)
