"""The rows of orders, put together from their files: how several rewards become one, scalars, tensors beside them."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from buffer.orders import Evaluation, Order, Plan, Sizes
from buffer.rules import Rules
from buffer.schema import ScoreTypes, stack, tensors_in, tensors_of
from buffer.state import File, State, Work, work_of

TIME = pa.timestamp("us", tz="UTC")


@dataclass(frozen=True)
class Combination:
    """The weighted sum of rewards, or the product of rewards that were scaled to 0..1.

    A product is high only where all of its parts are: what fails the prompt gets nothing for being beautiful.

    Example: Combination({"aesthetic": 1.0, "vqa": 2.0}, ranges={"aesthetic": (3.0, 7.0), "vqa": (0.0, 1.0)})
    """

    weights: Mapping[str, float]  # by reward; a product's weights are exponents
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)  # for a product: what becomes 0 and 1

    def __call__(self, scores: Mapping[str, np.ndarray]) -> np.ndarray:
        """float64 [B] of each reward's scores [B]; nan where one of them is."""
        columns = {name: np.asarray(scores[name], np.float64) for name in self.weights}
        if not self.ranges:
            return np.asarray(np.sum([weight * columns[name] for name, weight in self.weights.items()], axis=0))
        scaled = {name: (columns[name] - low) / (high - low) for name, (low, high) in self.ranges.items()}
        return np.asarray(np.prod([scaled[name].clip(0, 1) ** w for name, w in self.weights.items()], axis=0))


def scalar_rows(
    order: Order, work: Work, rewards: Sequence[str], scores: Mapping[str, pa.Table], combination: Combination
) -> pa.Table:
    """Every row of an order, set aside or not, as it is stored in Parquet (docs/buffer.md has the columns).

    rewards: those that the order wants; scores: of them, what there is."""
    rows = len(order.trajectory_ids)
    aside = dict(work.set_aside)
    version, digest = work.version or (None, None)
    age = in_flight = None
    if order.batch is not None and version is not None:
        age = order.batch - version
        in_flight = work.newest - version if work.scores else None
    columns: dict[str, Any] = {
        "trajectory_id": pa.array(order.trajectory_ids, pa.int64()),
        "order_id": pa.array([order.order_id] * rows, pa.string()),
        "batch": pa.array([order.batch] * rows, pa.int32()),
        "prompt": pa.array(order.prompts, pa.string()),
        "prompt_id": pa.array(order.prompt_ids, pa.int32()),
        "seed": pa.array(order.seeds, pa.int64()),
        "policy_version": pa.array([version] * rows, pa.int32()),
        "policy_digest": pa.array([digest] * rows, pa.string()),
        "age": pa.array([age] * rows, pa.int32()),
        "age_in_flight": pa.array([in_flight] * rows, pa.int32()),
    }
    values: dict[str, np.ndarray] = {}
    for reward in rewards:
        found = _aligned(columns["trajectory_id"], scores.get(reward))
        columns[reward] = found.pop("score", pa.nulls(rows, pa.float32()))
        columns.update({f"{reward}.{name}": column for name, column in found.items()})
        values[reward] = columns[reward].to_numpy(zero_copy_only=False)
    all_there = combination.weights.keys() <= values.keys()  # an evaluation set may want others
    total = combination(values) if all_there else np.full(rows, np.nan)
    left_out = np.array([trajectory_id in aside for trajectory_id in order.trajectory_ids])
    columns["reward"] = pa.array(total.astype(np.float32), mask=left_out | np.isnan(total))
    columns["set_aside"] = pa.array([aside.get(trajectory_id) for trajectory_id in order.trajectory_ids], pa.string())
    for name, time in (("claimed", work.claimed), ("rolled_out", work.rolled_out), ("scored", work.scored)):
        columns[name] = times(time, rows)
    return pa.table(columns)


def times(seconds: float, rows: int) -> pa.Array:
    """A column of one moment; nulls for 0, which stands for never."""
    return pa.array([int(seconds * 1e6) if seconds else None] * rows, TIME)


def _aligned(ids: pa.Array, scores: pa.Table | None) -> dict[str, pa.Array]:
    """A reward's columns in the order of `ids`, null where it has no row."""
    if scores is None:
        return {}
    places = pc.index_in(ids, value_set=scores["trajectory_id"].combine_chunks())
    found = scores.drop_columns(["trajectory_id"]).combine_chunks().take(places)
    return {name: found[name].combine_chunks() for name in found.column_names}


def with_tensors(scalars: pa.Table, tensors: pa.Table) -> pa.Table:
    """Scalars and tensors of one order side by side, without the rows that are set aside; nothing heavy is copied."""
    for name in tensors_in(tensors):
        scalars = scalars.append_column(name, tensors[name])
    live = scalars["set_aside"].is_null().to_numpy()
    edges = np.flatnonzero(np.diff(np.concatenate([[0], live.astype(np.int8), [0]])))
    runs = zip(edges[::2], edges[1::2], strict=True)
    pieces = [scalars.slice(start, stop - start) for start, stop in runs]
    return pa.concat_tables(pieces) if pieces else scalars.slice(0, 0)


class Assembly:
    """Puts the rows of orders together, from one state's files."""

    def __init__(
        self,
        plan: Plan,
        rules: Rules,
        combination: Combination,
        state: State,
        read: Callable[[str, File, str | None], pa.Table | None],
        make_again: Callable[[str, str | None, File, str], None],
    ) -> None:
        """read: the table of (order, file, reward of scores), None if it is damaged. make_again: is told (order,
        reward, file, why) of scores that fit no longer."""
        self.plan = plan
        self.rewards_of = rules.rewards_of
        self.combination = combination
        self.state = state
        self.read = read
        self.make_again = make_again

    def rows(self, orders: tuple[str, ...], tensors: bool) -> tuple[pa.Table | None, pa.Table]:
        """(rows that take part, rows set aside), sorted; None for the first if anything is damaged."""
        live, aside, whole = [], [], True
        all_scores = self._scores(orders)
        for order_id in orders:
            work = work_of(self.state, order_id)
            left_out = self._left_out(work)
            file = work.rollout.latents if work.rollout and tensors and not left_out else None
            table = self.read(order_id, file, None) if file else None
            scores = all_scores[order_id]
            damaged_table = tensors and not left_out and table is None
            whole = whole and not damaged_table and None not in scores.values()
            if not whole:
                continue
            rows = scalar_rows(self.plan.order(order_id), work, self.rewards_of(order_id), scores, self.combination)
            aside.append(rows.filter(rows["set_aside"].is_valid()))
            if table is not None:
                live.append(with_tensors(rows, table))
            elif not tensors:
                live.append(rows.filter(rows["set_aside"].is_null()))
        return (stack(live) if whole else None), stack(aside) if aside else pa.table({})

    def _scores(self, orders: tuple[str, ...]) -> dict[str, dict[str, pa.Table | None]]:
        """By order, each reward's scores. None: they are made again, being damaged, or of other types than those that
        came last: the reward was mended between two starts."""
        types = ScoreTypes()
        found: dict[str, dict[str, pa.Table | None]] = {}
        for order_id in sorted(orders, key=lambda order_id: -work_of(self.state, order_id).scored):
            work = work_of(self.state, order_id)
            found[order_id] = {}
            for score in () if self._left_out(work) else work.scores:
                table = self.read(order_id, score.file, score.reward)
                if table is not None and not types.fit(score.reward, table.schema):
                    why = "is of other types than the reward's scores now"
                    self.make_again(order_id, score.reward, score.file, why)
                    table = None
                if table is not None:
                    types.check(score.reward, table.schema)
                found[order_id][score.reward] = table
        return found

    def _left_out(self, work: Work) -> bool:
        return len(work.set_aside) == self.plan.order_size


def first_pictures(
    read: Callable[[File], pa.Table | None], sizes: Sizes, state: State, evaluation: Evaluation, count: int
) -> dict[int, np.ndarray] | None:
    """Pictures of the first `count` pairs of a finished evaluation by trajectory id, uint8 [H, W, 3], without those set
    aside. None when retention has dropped them (of each set the two finished last are kept) or a file of them is
    damaged, for which `read` gives None."""
    orders = sizes.evaluation_orders(evaluation)[: math.ceil(count / sizes.order_size)]
    wanted = [trajectory_id for order_id in orders for trajectory_id in sizes.trajectory_ids(order_id)][:count]
    pictures: dict[int, np.ndarray] = {}
    for work in (work_of(state, order_id) for order_id in orders):
        table = read(work.rollout.images) if work.rollout else None
        if table is not None:
            pictures |= zip(table["trajectory_id"].to_pylist(), tensors_of(table)["image"], strict=True)
        elif len(work.set_aside) < sizes.order_size:
            return None
        for trajectory_id, _ in work.set_aside:
            pictures.pop(trajectory_id, None)
    return {trajectory_id: pictures[trajectory_id] for trajectory_id in wanted if trajectory_id in pictures}
