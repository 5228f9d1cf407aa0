"""A scorer: leases an order's pictures, scores them with one reward, and hands the scores in."""

from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa

from buffer.protocol import Buffer, Lease
from buffer.schema import tensors_of
from common.clock import Clock
from rewards.base import NamedReward, Scores, score_order, score_rows


class NothingScored(Exception):
    """Every picture of an order failed. That may be theirs, or this process's, in which something broke for good (a
    pool of helpers, a connection): so the next one to try is new."""


class Scorer:
    """Call `step` again and again."""

    def __init__(
        self,
        name: str,
        reward: NamedReward,
        batch_size: int,
        buffer: Buffer,
        clock: Clock,
        stored: Callable[[str, Sequence[int]], pa.Table] | None = None,
    ) -> None:
        """batch_size: pictures a call of the reward. stored: where a replay takes the scores of batches from."""
        self.name = name
        self.reward = reward
        self.batch_size = batch_size
        self.buffer = buffer
        self.clock = clock
        self.stored = stored

    def step(self) -> bool:
        """Whether there were pictures. Raises UserError when the reward answers in other types than before; what its
        device or memory raises, which counts against no picture; and NothingScored."""
        lease = self.buffer.lease(self.reward.name, self.name)
        if lease is None:
            return False
        with self.clock.on("scoring"):
            table, reasons = self._score(lease)
        with self.clock.on("handing in"):
            order = self.reward.name, lease.order_id, lease.table_digest
            if reasons:  # the order is offered again, until each of its pictures is scored or set aside
                self.buffer.pictures_failed(*order, self.name, reasons)
                if not table.num_rows:
                    raise NothingScored(f"not one picture of {lease.order_id} could be scored; a new process tries")
            else:
                self.buffer.add_scores(*order, table)
        return True

    def _score(self, lease: Lease) -> tuple[pa.Table, dict[int, str]]:
        """Scores of the pictures that take part, and by trajectory id why some have none."""
        ids = lease.table["trajectory_id"].to_numpy()
        if self.stored is not None and (ids >= 0).all():  # those of evaluations are negative
            return self.stored(self.reward.name, ids.tolist()), {}
        wanted = np.flatnonzero(~np.isin(ids, lease.skip))
        shown = np.where(np.isin(ids, lease.skip), wanted[0], np.arange(len(ids)))  # so that slices keep their shape
        images = tensors_of(lease.table)["image"][shown]
        prompts = [lease.table["prompt"][int(row)].as_py() for row in shown]
        if lease.alone:
            return self._score_alone(ids, images, prompts, wanted)
        scores, failed = score_order(self.reward, images, prompts, self.batch_size)
        scored = [row for row in range(len(ids)) if row not in failed]
        table = _table(ids[scored], scores)
        return table.filter(np.isin(scored, wanted)), {
            int(ids[row]): reason for row, reason in failed.items() if row in wanted
        }

    def _score_alone(
        self, ids: np.ndarray, images: np.ndarray, prompts: list[str], wanted: np.ndarray
    ) -> tuple[pa.Table, dict[int, str]]:
        """Picture by picture, each announced first: if one kills this process, the buffer knows which."""
        tables: list[pa.Table] = []
        reasons: dict[int, str] = {}
        for row in wanted:
            self.buffer.trying_alone(self.name, int(ids[row]))
            scores, failed = score_rows(self.reward, images, prompts, [row], self.batch_size)
            tables.append(_table(ids[[row]] if not failed else ids[:0], scores))
            reasons |= {int(ids[row]): reason for reason in failed.values()}
        self.buffer.trying_alone(self.name, None)
        return pa.concat_tables(tables, promote_options="default"), reasons


def _table(ids: np.ndarray, scores: Scores) -> pa.Table:
    return pa.table({"trajectory_id": ids, "score": scores.scores, **scores.columns})
