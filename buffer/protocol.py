"""What the buffer and its workers say to each other: the calls, and what they are answered with.

`TrajectoryBuffer` itself has these calls, for workers of the same process, and so has its stand-in for workers of other
processes (actors/remote_buffer.py). Every call may be made twice: the second time changes nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import pyarrow as pa

from buffer.orders import Evaluation, Order, Version


class Refused(Exception):
    """A call of somebody whose work does not count (any more); whoever made it drops the work and asks anew."""


@dataclass(frozen=True)
class Claim:
    """Roll this order out with these weights, and `add` the table.

    Example: Claim(order=Order("b00003.02", ...), version=Version(2, "9f86d081884c7d65"), weights={...})
    """

    order: Order
    version: Version  # give it back to `add`; any other is refused
    weights: Any  # what the version was published with


@dataclass(frozen=True)
class Lease:
    """Score these pictures, and `add_scores`.

    Example: Lease("b00003.02", "4355a46b19d348dc", table, skip=(226,), alone=False)
    """

    order_id: str
    table_digest: str  # give it back to `add_scores`; scores of another table are refused
    table: pa.Table  # trajectory_id int64, prompt string, image uint8 [H, W, 3]: always all rows of the order
    skip: tuple[int, ...]  # set aside already: pad their rows, so that the batch keeps its shape, and give no score
    alone: bool  # scoring it has killed workers: try the pictures one by one (`trying_alone`) to find the one


@dataclass(frozen=True)
class TakenBatch:
    """Train this batch, write recovery point and Parquet file under the names given, and call `trained`."""

    batch: int
    version: Version  # the weights that it is trained from; a learner that has others reloads first
    roster: str  # digest of what is trained on; `store.write_batch` puts it into the Parquet file
    name: str  # "e0001.003": epoch and attempt, in the name of every file the learner writes
    table: pa.Table  # the rows to train on, by ascending trajectory_id: scalars, the path, rewards, "reward"
    set_aside: pa.Table  # scalars of the rows that take no part, with the reason in "set_aside"
    lr_halvings: int = 0  # how often the guard has halved the learning rate

    @property
    def recovery_point(self) -> str:
        """Where to write the recovery point, relative to the run folder."""
        return f"checkpoints/v{self.batch + 1:05d}.{self.name}"

    @property
    def parquet(self) -> str:
        """Where `store.write_batch` writes the batch's rows, relative to the run folder."""
        return f"trajectories/b{self.batch:05d}.{self.name}.parquet"


@dataclass(frozen=True)
class News:
    """What has become of the run, for who publishes, watches and ends it."""

    epoch: int  # another one than before: the buffer was restarted and needs the weights again
    stop: str | None  # why the run must stop, a sentence
    finished: bool
    to_publish: list[tuple[Version, str]]  # versions to publish and their recovery points, oldest first
    served: list[Version]  # versions whose weights somebody may still ask for
    evaluations: list[Evaluation]  # that are complete
    overdue: list[str]  # workers to be killed, for what they hold has outlived its time-out
    batches: int  # that the run is to train
    trained: int  # of them
    training: bool  # a learner has a batch
    orders: dict[str, int]  # of admitted batches: "open", "claimed", "rolled_out" (waiting for scores), "scored"
    evaluating: int  # orders of evaluations that are not over
    set_aside: dict[str, int]  # reason -> pictures, over the whole run
    notes: list[str]  # what was damaged, removed or missed in this epoch, in sentences
    seconds: dict[str, dict[str, float]]  # of each worker, by occupation, as far as they told the buffer
    draining: bool  # nothing new is handed out
    lr_halvings: int  # what `slow` was told in this epoch


# Whom a worker's death is charged to. "device": its device or memory, which only a picture tried alone can be to blame
# for. "nobody": it was ended on purpose, or its host is lost.
Charged = Literal["work", "device", "nobody"]


class Buffer(Protocol):
    """See `TrajectoryBuffer` for each of these."""

    def prompts(self) -> tuple[str, ...]: ...

    def claim(self, worker: str) -> Claim | None: ...
    def add(self, order_id: str, version: Version, table: pa.Table) -> bool: ...
    def order_failed(self, order_id: str, worker: str, message: str) -> None: ...

    def lease(self, reward: str, worker: str) -> Lease | None: ...
    def add_scores(self, reward: str, order_id: str, table_digest: str, table: pa.Table) -> bool: ...
    def pictures_failed(
        self, reward: str, order_id: str, table_digest: str, worker: str, reasons: Mapping[int, str]
    ) -> None: ...
    def trying_alone(self, worker: str, trajectory_id: int | None) -> None: ...

    def take(self, learner: str) -> TakenBatch | None: ...
    def initial_recovery_point(self) -> str: ...
    def trained(self, batch: int, version_after: Version, recovery_point: str, parquet: str) -> str | None: ...
    def current(self) -> tuple[Version, str] | None: ...
