"""What a run is asked to make: batches of orders, each a fixed chunk of (prompt, seed) pairs.

Everything here is a pure function of the run's seed and sizes, so a restart, another host or a colder computer draws
the very same pairs. Ids say what they are:

    order "b00003.02"   the third order of batch 3          trajectories  3 * batch_size + 2 * order_size, ...
    order "e00012.00"   the first evaluation order of version 12   trajectories  -(1 + 12 * evaluation_count + 0), ...
"""

import hashlib
import json
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

BATCHES, EVALUATION = 0, 1  # streams of random numbers, so that the two never share a seed


class Version(NamedTuple):
    """Weights after `number` batches. Two lines of history can give one number to different weights, so the digest
    of the LoRA tensors (the first 16 characters of their sha256) always travels with it.

    Example: Version(12, "9f86d081884c7d65")
    """

    number: int
    digest: str


class OrderName(NamedTuple):
    """An order id, taken apart."""

    evaluation: bool
    group: int  # the batch, or the version that is evaluated
    place: int  # of the order within it


@lru_cache(maxsize=65536)
def parse(order_id: str) -> OrderName:
    group, place = order_id[1:].split(".")
    return OrderName(order_id[0] == "e", int(group), int(place))


@dataclass(frozen=True)
class Sizes:
    """How trajectories are grouped; all that the state machine knows of a plan."""

    batch_size: int  # trajectories a batch
    order_size: int  # trajectories an order
    evaluation_count: int  # trajectories an evaluation

    @lru_cache(maxsize=1024)  # noqa: B019  (a run has one Sizes, and it lives as long as the run)
    def batch_orders(self, batch: int) -> tuple[str, ...]:
        return tuple(f"b{batch:05d}.{i:02d}" for i in range(self.batch_size // self.order_size))

    @lru_cache(maxsize=1024)  # noqa: B019
    def evaluation_orders(self, version: int) -> tuple[str, ...]:
        return tuple(f"e{version:05d}.{i:02d}" for i in range(self.evaluation_count // self.order_size))

    @lru_cache(maxsize=4096)  # noqa: B019
    def trajectory_ids(self, order_id: str) -> tuple[int, ...]:
        evaluation, group, place = parse(order_id)
        rows = range(place * self.order_size, (place + 1) * self.order_size)
        if evaluation:
            return tuple(-(1 + group * self.evaluation_count + row) for row in rows)
        return tuple(group * self.batch_size + row for row in rows)


@dataclass(frozen=True)
class Order:
    """A fixed chunk of (prompt, seed) pairs: the unit that is claimed, rolled out, leased and scored.

    Example: Order("b00003.02", batch=3, version=None, trajectory_ids=(224, ...), prompts=("a cat", ...), ...)
    """

    order_id: str
    batch: int | None  # None for an evaluation order
    version: int | None  # the version number an evaluation order asks for; None for an order of a batch
    trajectory_ids: tuple[int, ...]
    prompts: tuple[str, ...]
    prompt_ids: tuple[int, ...]  # places in the plan's prompts
    seeds: tuple[int, ...]  # 63 bits each, for torch.Generator.manual_seed


@dataclass(frozen=True)
class Plan:
    """What the run makes, from its seed: prompts and seeds of every batch and of the evaluation set."""

    seed: int
    prompts: tuple[str, ...]
    batch_size: int
    order_size: int
    evaluation_count: int

    def __post_init__(self) -> None:
        assert self.prompts, "a plan needs at least one prompt"
        assert self.seed >= 0, f"the seed is {self.seed}; it must not be negative"
        assert self.batch_size % self.order_size == 0, (self.batch_size, self.order_size)
        assert self.batch_size >= 4 * self.order_size, "a batch has at least four orders"
        assert self.evaluation_count % self.order_size == 0, (self.evaluation_count, self.order_size)

    @property
    def sizes(self) -> Sizes:
        return Sizes(self.batch_size, self.order_size, self.evaluation_count)

    def identity(self) -> dict[str, Any]:
        """What makes two plans the same; kept in the journal, where another plan is refused."""
        return {
            "seed": self.seed,
            "prompts": hashlib.sha256(json.dumps(self.prompts).encode()).hexdigest()[:16],
            "batch_size": self.batch_size,
            "order_size": self.order_size,
            "evaluation_count": self.evaluation_count,
        }

    def batch(self, batch: int) -> list[Order]:
        return [self.order(order_id) for order_id in self.sizes.batch_orders(batch)]

    def evaluation(self, version: int) -> list[Order]:
        """Orders of the evaluation set at a version: the same pairs for every version, under ids of their own."""
        return [self.order(order_id) for order_id in self.sizes.evaluation_orders(version)]

    def order(self, order_id: str) -> Order:
        evaluation, group, place = parse(order_id)
        ids = self.sizes.trajectory_ids(order_id)
        if evaluation:
            rows = range(place * self.order_size, (place + 1) * self.order_size)
            pairs = [self._evaluation_pair(row) for row in rows]
        else:
            pairs = [self._pair(trajectory_id) for trajectory_id in ids]
        prompt_ids, seeds = zip(*pairs, strict=True)
        return Order(
            order_id=order_id,
            batch=None if evaluation else group,
            version=group if evaluation else None,
            trajectory_ids=ids,
            prompts=tuple(self.prompts[i] for i in prompt_ids),
            prompt_ids=prompt_ids,
            seeds=seeds,
        )

    def _pair(self, trajectory_id: int) -> tuple[int, int]:
        seed, draw = self._words(BATCHES, trajectory_id)
        return draw % len(self.prompts), seed >> 1  # 64 bits modulo some hundred prompts: uniform to 1e-17

    def _evaluation_pair(self, row: int) -> tuple[int, int]:
        """Every prompt equally often as far as the count goes, in an order that the seed shuffles."""
        seed, _ = self._words(EVALUATION, row)
        return _shuffled(self.seed, len(self.prompts))[row % len(self.prompts)], seed >> 1

    def _words(self, stream: int, row: int) -> tuple[int, int]:
        first, second = np.random.SeedSequence([self.seed, stream, row]).generate_state(2, np.uint64)
        return int(first), int(second)


@lru_cache(maxsize=8)
def _shuffled(seed: int, count: int) -> tuple[int, ...]:
    return tuple(int(i) for i in np.random.default_rng([seed, EVALUATION]).permutation(count))
