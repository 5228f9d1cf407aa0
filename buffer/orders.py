"""What a run is asked to make: batches of orders, each a fixed chunk of (prompt, seed) pairs.

Everything here is a pure function of the run's seed and sizes, so a restart, another host or a colder computer draws
the very same pairs. Ids say what they are:

    order "b00003.02"   the third order of batch 3          trajectories  3 * batch_size + 2 * order_size, ...
    order "e00012.train.00"   the first of set "train" at version 12   trajectories  -1 - 12 * pairs of all sets, ...
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


class Evaluation(NamedTuple):
    """A version on an evaluation set. Example: Evaluation(12, "train")"""

    version: int
    set: str


class OrderName(NamedTuple):
    """An order id, taken apart."""

    evaluation: Evaluation | None  # None of a batch's
    group: int  # the batch, or the version that is evaluated
    place: int  # of the order within it


@lru_cache(maxsize=65536)
def parse(order_id: str) -> OrderName:
    group, *name, place = order_id[1:].split(".")
    return OrderName(Evaluation(int(group), name[0]) if name else None, int(group), int(place))


@dataclass(frozen=True)
class Sizes:
    """How trajectories are grouped; all that the state machine knows of a plan."""

    batch_size: int  # trajectories a batch
    order_size: int  # trajectories an order
    sets: tuple[tuple[str, int], ...]  # name of each evaluation set, and its trajectories

    @lru_cache(maxsize=1024)  # noqa: B019  (a run has one Sizes, and it lives as long as the run)
    def batch_orders(self, batch: int) -> tuple[str, ...]:
        return tuple(f"b{batch:05d}.{i:02d}" for i in range(self.batch_size // self.order_size))

    @lru_cache(maxsize=1024)  # noqa: B019
    def evaluation_orders(self, evaluation: Evaluation) -> tuple[str, ...]:
        version, name = evaluation
        return tuple(f"e{version:05d}.{name}.{i:02d}" for i in range(dict(self.sets)[name] // self.order_size))

    @lru_cache(maxsize=4096)  # noqa: B019
    def trajectory_ids(self, order_id: str) -> tuple[int, ...]:
        evaluation, group, place = parse(order_id)
        rows = range(place * self.order_size, (place + 1) * self.order_size)
        if evaluation:
            before = [count for name, count in self.sets[: [*dict(self.sets)].index(evaluation.set)]]
            first = group * sum(count for _, count in self.sets) + sum(before)
            return tuple(-(1 + first + row) for row in rows)
        return tuple(group * self.batch_size + row for row in rows)


@dataclass(frozen=True)
class Order:
    """A fixed chunk of (prompt, seed) pairs: the unit that is claimed, rolled out, leased and scored.

    Example: Order("b00003.02", batch=3, evaluation=None, trajectory_ids=(224, ...), prompts=("a cat", ...), ...)
    """

    order_id: str
    batch: int | None  # None for an evaluation order
    evaluation: Evaluation | None  # None for an order of a batch
    trajectory_ids: tuple[int, ...]
    prompts: tuple[str, ...]
    prompt_ids: tuple[int, ...]  # places in the plan's prompts, or in those of the evaluation set
    seeds: tuple[int, ...]  # 63 bits each, for torch.Generator.manual_seed
    noise_seeds: tuple[int, ...]  # whose first noise each trajectory starts from: its own, or its group's


@dataclass(frozen=True)
class FixedSet:
    """An evaluation set: the same pairs for every version."""

    name: str
    count: int
    prompts: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """What the run makes, from its seed: prompts and seeds of every batch and of the evaluation sets."""

    seed: int
    prompts: tuple[str, ...]
    batch_size: int
    order_size: int
    sets: tuple[FixedSet, ...]
    group_size: int = 1  # trajectories of one prompt that are drawn together, by consecutive ids
    same_noise: bool = False  # whether those of a group start from one noise
    replayed: tuple[tuple[int, int], ...] = ()  # (prompt id, seed) of every trajectory of a replay; else they are drawn
    stored: tuple[str, ...] = ()  # of a replay: names each trajectory that it learns from, however often it does

    def __post_init__(self) -> None:
        assert self.prompts, "a plan needs at least one prompt"
        assert self.seed >= 0, f"the seed is {self.seed}; it must not be negative"
        assert self.batch_size % self.order_size == 0, (self.batch_size, self.order_size)
        assert self.batch_size >= 4 * self.order_size, "a batch has at least four orders"
        assert self.batch_size % self.group_size == 0, (self.batch_size, self.group_size)
        assert all(one.count % self.order_size == 0 for one in self.sets), (self.sets, self.order_size)

    @property
    def sizes(self) -> Sizes:
        return Sizes(self.batch_size, self.order_size, tuple((one.name, one.count) for one in self.sets))

    @property
    def all_prompts(self) -> tuple[str, ...]:
        """Those of batches and of evaluation sets, each once."""
        return tuple(dict.fromkeys((*self.prompts, *(prompt for one in self.sets for prompt in one.prompts))))

    def identity(self) -> dict[str, Any]:
        """What makes two plans the same; kept in the journal, where another plan is refused."""
        return {
            "seed": self.seed,
            "prompts": _digest(self.prompts),
            "batch_size": self.batch_size,
            "order_size": self.order_size,
            "sets": {one.name: f"{one.count} of prompts {_digest(one.prompts)}" for one in self.sets},
            **({"groups": f"{self.group_size}, same_noise={self.same_noise}"} if self.group_size > 1 else {}),
            **({"replayed": _digest(self.stored)} if self.replayed else {}),
        }

    def batch(self, batch: int) -> list[Order]:
        return [self.order(order_id) for order_id in self.sizes.batch_orders(batch)]

    def evaluation(self, evaluation: Evaluation) -> list[Order]:
        """Orders of an evaluation: the same pairs for every version, under ids of their own."""
        return [self.order(order_id) for order_id in self.sizes.evaluation_orders(evaluation)]

    def order(self, order_id: str) -> Order:
        evaluation, group, place = parse(order_id)
        ids, prompts = self.sizes.trajectory_ids(order_id), self.prompts
        if evaluation:
            prompts = next(one.prompts for one in self.sets if one.name == evaluation.set)
            rows = range(place * self.order_size, (place + 1) * self.order_size)
            pairs = [self._evaluation_pair(row, len(prompts)) for row in rows]
        else:
            pairs = [self._pair(trajectory_id) for trajectory_id in ids]
        prompt_ids, seeds = zip(*pairs, strict=True)
        shared = self.same_noise and not evaluation
        return Order(
            order_id=order_id,
            batch=None if evaluation else group,
            evaluation=evaluation,
            trajectory_ids=ids,
            prompts=tuple(prompts[i] for i in prompt_ids),
            prompt_ids=prompt_ids,
            seeds=seeds,
            noise_seeds=tuple(self._pair(one - one % self.group_size)[1] for one in ids) if shared else seeds,
        )

    def _pair(self, trajectory_id: int) -> tuple[int, int]:
        if self.replayed:
            return self.replayed[trajectory_id]
        seed, _ = self._words(BATCHES, trajectory_id)
        _, draw = self._words(BATCHES, trajectory_id - trajectory_id % self.group_size)
        return draw % len(self.prompts), seed >> 1  # 64 bits modulo some hundred prompts: uniform to 1e-17

    def _evaluation_pair(self, row: int, prompts: int) -> tuple[int, int]:
        """Every prompt equally often as far as the count goes, in an order that the seed shuffles."""
        seed, _ = self._words(EVALUATION, row)
        return _shuffled(self.seed, prompts)[row % prompts], seed >> 1

    def _words(self, stream: int, row: int) -> tuple[int, int]:
        first, second = np.random.SeedSequence([self.seed, stream, row]).generate_state(2, np.uint64)
        return int(first), int(second)


def _digest(texts: tuple[str, ...]) -> str:
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]


@lru_cache(maxsize=8)
def _shuffled(seed: int, count: int) -> tuple[int, ...]:
    return tuple(int(i) for i in np.random.default_rng([seed, EVALUATION]).permutation(count))
