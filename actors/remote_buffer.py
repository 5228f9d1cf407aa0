"""The buffer's actor as workers of other processes see it: calls that wait through its restarts."""

import time
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np
import pyarrow as pa
import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorUnavailableError, GetTimeoutError

from actors.buffer_actor import BufferActor, Seconds
from buffer.orders import Version
from buffer.protocol import Claim, Lease, News, TakenBatch
from common.clock import Clock

P = ParamSpec("P")
T = TypeVar("T")
WAIT_S = 5.0  # of one call for work; who waits longer asks again, which also tells how long it waited
PATIENCE_S = 300.0  # a buffer that restarts elsewhere replays its journal in seconds; its node or disk may take minutes


class BufferSilent(Exception):
    """The buffer lives, as far as anybody knows, and has not answered for PATIENCE_S seconds."""


class RemoteBuffer:
    """A `Buffer` (buffer/protocol.py), for one worker: calls for work tell the actor what `clock` has counted, and the
    clock what they waited for. And what the driver asks of it besides.

    Every call is idempotent, so asking twice is harmless; Ray's own retries are off, because they would hide a death
    that a worker has to know of. All raise BufferSilent, and RayActorError once the buffer is dead for good.
    """

    def __init__(self, actor: ActorHandle[Any], worker: str = "", clock: Clock | None = None) -> None:
        self.actor = actor
        self.worker = worker
        self.clock = clock or Clock()

    def prompts(self) -> tuple[str, ...]:
        return self._call(BufferActor.prompts)

    def claim(self, worker: str) -> Claim | None:
        return self._ask("orders", BufferActor.claim, worker)

    def add(self, order_id: str, version: Version, table: pa.Table) -> bool:
        return self._call(BufferActor.add, order_id, version, table)

    def order_failed(self, order_id: str, worker: str, message: str) -> None:
        self._call(BufferActor.order_failed, order_id, worker, message)

    def lease(self, reward: str, worker: str) -> Lease | None:
        return self._ask("pictures", BufferActor.lease, reward, worker)

    def add_scores(self, reward: str, order_id: str, table_digest: str, table: pa.Table) -> bool:
        return self._call(BufferActor.add_scores, reward, order_id, table_digest, table)

    def pictures_failed(
        self, reward: str, order_id: str, table_digest: str, worker: str, reasons: Mapping[int, str]
    ) -> None:
        self._call(BufferActor.pictures_failed, reward, order_id, table_digest, worker, dict(reasons))

    def trying_alone(self, worker: str, trajectory_id: int | None) -> None:
        self._call(BufferActor.trying_alone, worker, trajectory_id)

    def take(self, learner: str) -> TakenBatch | None:
        return self._ask("batches", BufferActor.take, learner, self.worker)

    def initial_recovery_point(self) -> str:
        return self._call(BufferActor.initial_recovery_point)

    def trained(self, batch: int, version_after: Version, recovery_point: str, parquet: str) -> str | None:
        return self._call(BufferActor.trained, batch, version_after, recovery_point, parquet)

    def current(self) -> tuple[Version, str] | None:
        return self._call(BufferActor.current)

    # ---- the driver's

    def publish(self, version: Version, weights: list[ray.ObjectRef[Any]]) -> None:
        self._call(BufferActor.publish, version, weights)

    def evaluation(self, version: int, pictures: int) -> tuple[pa.Table, dict[int, np.ndarray] | None]:
        return self._call(BufferActor.evaluation, version, pictures)

    def evaluation_missed(self, version: int, why: str) -> None:
        self._call(BufferActor.evaluation_missed, version, why)

    def worker_died(self, worker: str, blameless: bool = False) -> None:
        self._call(BufferActor.worker_died, worker, blameless)

    def drain(self) -> None:
        self._call(BufferActor.drain)

    def poll(self, wait_s: float) -> News:
        return self._call(BufferActor.poll, wait_s)

    # ---- the machinery

    def _call(
        self, method: Callable[Concatenate[BufferActor, P], Coroutine[Any, Any, T]], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """The answer of an actor's method, asked again while the actor restarts."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                asked: ray.ObjectRef[T] = getattr(self.actor, method.__name__).remote(*args, **kwargs)
                return ray.get(asked, timeout=max(0.0, deadline - time.monotonic()))
            except GetTimeoutError as error:
                raise BufferSilent(f"the buffer has not answered for {PATIENCE_S:.0f} s") from error
            except ActorUnavailableError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)

    def _ask(self, what: str, method: Callable[..., Coroutine[Any, Any, tuple[T, Seconds]]], *args: str) -> T:
        """What the buffer hands out for this call (None: nothing in time). The clock hears how long it waited and for
        whom; what the buffer itself took, and its restarts, is "waiting for the buffer"."""
        start = time.monotonic()
        answer, waited = self._call(method, *args, self.clock.read(), WAIT_S)
        for whom, seconds in waited.items():
            self.clock.seconds[f"waiting for {what}: {whom}"] += seconds
        self.clock.seconds["waiting for the buffer"] += max(0.0, time.monotonic() - start - sum(waited.values()))
        return answer
