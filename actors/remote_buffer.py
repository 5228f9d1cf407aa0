"""The buffer's actor as workers of other processes see it: calls that wait through its restarts."""

import time
from collections.abc import Callable, Coroutine
from typing import Any, Concatenate, ParamSpec, TypeVar

import pyarrow as pa
import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorUnavailableError, GetTimeoutError

from actors.buffer_actor import BufferActor, Seconds
from buffer.buffer import TrajectoryBuffer
from buffer.orders import Version
from buffer.protocol import Charged, Claim, Lease, News, TakenBatch
from common.clock import Clock

P = ParamSpec("P")
T = TypeVar("T")
WAIT_S = 5.0  # of one call for work; a worker that got none asks again, and so reports how long it waited
PATIENCE_S = 300.0  # a buffer that restarts elsewhere replays its journal in seconds; its node or disk may take minutes


class BufferSilent(Exception):
    """The buffer lives, as far as anybody knows, and has not answered for PATIENCE_S seconds."""


def _told(method: Callable[Concatenate[TrajectoryBuffer, P], T]) -> Callable[Concatenate["RemoteBuffer", P], T]:
    """The same method, asked of the actor."""

    def ask(self: "RemoteBuffer", /, *args: P.args, **kwargs: P.kwargs) -> T:
        answer: T = self._call(BufferActor.get, method.__name__, *args, **kwargs)
        return answer

    return ask


def _done(method: Callable[Concatenate[TrajectoryBuffer, P], T]) -> Callable[Concatenate["RemoteBuffer", P], T | None]:
    """The same for one that changes something: None where the run stops instead."""

    def do(self: "RemoteBuffer", /, *args: P.args, **kwargs: P.kwargs) -> T | None:
        answer: T | None = self._call(BufferActor.do, method.__name__, *args, **kwargs)
        return answer

    return do


class RemoteBuffer:
    """A `Buffer` (buffer/protocol.py) for one worker, and the calls that only the driver makes. Calls for work
    send what `clock` has counted, and count into it what they waited for.

    Every call is idempotent, so asking twice is harmless; Ray's own retries are off, because they would hide a death
    that a worker has to know of. All raise BufferSilent, and RayActorError once the buffer is dead for good.
    """

    def __init__(self, actor: ActorHandle[Any], worker: str = "", clock: Clock | None = None) -> None:
        self.actor = actor
        self.worker = worker
        self.clock = clock or Clock()

    prompts = _told(TrajectoryBuffer.prompts)
    current = _told(TrajectoryBuffer.current)
    initial_recovery_point = _told(TrajectoryBuffer.initial_recovery_point)
    order_failed = _done(TrajectoryBuffer.order_failed)
    pictures_failed = _done(TrajectoryBuffer.pictures_failed)
    trying_alone = _done(TrajectoryBuffer.trying_alone)
    trained = _done(TrajectoryBuffer.trained)

    def add(self, order_id: str, version: Version, table: pa.Table) -> bool:
        return bool(self._call(BufferActor.do, "add", order_id, version, table))

    def add_scores(self, reward: str, order_id: str, table_digest: str, table: pa.Table) -> bool:
        return bool(self._call(BufferActor.do, "add_scores", reward, order_id, table_digest, table))

    def claim(self, worker: str) -> Claim | None:
        return self._ask("orders", BufferActor.claim, worker)

    def lease(self, reward: str, worker: str) -> Lease | None:
        return self._ask("pictures", BufferActor.lease, reward, worker)

    def take(self, learner: str) -> TakenBatch | None:
        return self._ask("batches", BufferActor.take, learner, self.worker)

    # ---- the driver's. `publish` gets a list of one reference, so that Ray passes the reference and not its content.

    publish = _done(TrajectoryBuffer.publish)
    evaluation = _told(TrajectoryBuffer.evaluation)
    evaluation_missed = _done(TrajectoryBuffer.evaluation_missed)
    slow = _done(TrajectoryBuffer.slow)

    def worker_died(self, worker: str, charged: Charged) -> None:
        self._call(BufferActor.worker_died, worker, charged)

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
