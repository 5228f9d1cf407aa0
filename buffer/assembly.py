"""Rows and pictures, put together from the files of orders."""

import math
from collections.abc import Callable

import numpy as np
import pyarrow as pa

from buffer.combination import Combination
from buffer.orders import Plan, Sizes
from buffer.schema import scalar_rows, stack, tensors_of, with_tensors
from buffer.score_types import ScoreTypes
from buffer.state import File, State, Work, work_of


class Assembly:
    """Puts the rows of orders together, from one state's files."""

    def __init__(
        self,
        plan: Plan,
        combination: Combination,
        state: State,
        read: Callable[[str, File, str | None], pa.Table | None],
        make_again: Callable[[str, str | None, File, str], None],
    ) -> None:
        """read: the table of (order, file, reward of scores), None if it is damaged. make_again: is told (order,
        reward, file, why) of scores that fit no longer."""
        self.plan = plan
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
            table = self.read(order_id, work.table, None) if tensors and work.table and not left_out else None
            scores = all_scores[order_id]
            damaged_table = tensors and not left_out and table is None
            whole = whole and not damaged_table and None not in scores.values()
            if not whole:
                continue
            rows = scalar_rows(self.plan.order(order_id), work, scores, self.combination)
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
    read: Callable[[File], pa.Table | None], sizes: Sizes, state: State, version: int, count: int
) -> dict[int, np.ndarray] | None:
    """Pictures of the first `count` pairs of a finished evaluation by trajectory id, uint8 [H, W, 3], without those set
    aside. None when retention has dropped them (the two evaluations finished last are kept) or a file of them is
    damaged, for which `read` gives None."""
    orders = sizes.evaluation_orders(version)[: math.ceil(count / sizes.order_size)]
    wanted = [trajectory_id for order_id in orders for trajectory_id in sizes.trajectory_ids(order_id)][:count]
    pictures: dict[int, np.ndarray] = {}
    for work in (work_of(state, order_id) for order_id in orders):
        table = read(work.table) if work.table else None
        if table is not None:
            pictures |= zip(table["trajectory_id"].to_pylist(), tensors_of(table)["image"], strict=True)
        elif len(work.set_aside) < sizes.order_size:
            return None
        for trajectory_id, _ in work.set_aside:
            pictures.pop(trajectory_id, None)
    return {trajectory_id: pictures[trajectory_id] for trajectory_id in wanted if trajectory_id in pictures}
