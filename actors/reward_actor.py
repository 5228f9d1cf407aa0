"""A reward actor: leases orders that are rolled out, scores their pictures, and hands the scores in."""

import numpy as np
import pyarrow as pa
import ray
import torch

from actors.calls import Clock, ask, call
from actors.devices import hide_unreserved_gpus
from actors.ending import judged
from buffer.messages import Lease
from buffer.schema import tensors_of
from common.blame import describe, is_the_workers
from common.precision import exact_float32
from conf.errors import UserError
from conf.schema import RewardConfig
from rewards.base import NamedReward, Scores, score_order, score_rows, the_machines, try_out
from rewards.registry import resolve


class NothingScored(Exception):
    """Every picture of an order failed. That may be theirs, or this process's, in which something broke for good (a
    pool of helpers, a connection): so the next one to try is new."""


class RewardActor:
    """One of the pool of one reward. Its name says role, index and incarnation."""

    def __init__(self, name: str, reward: str, config: RewardConfig) -> None:
        hide_unreserved_gpus()
        exact_float32()
        torch.set_num_threads(config.threads)
        self.name = name
        self.reward_name = reward
        self.config = config
        self.reward: NamedReward | None = None

    def __repr__(self) -> str:
        return self.name

    def prepare(self, prompts: list[str], image_size: tuple[int, int]) -> str | None:
        """Loads the reward and tries it on two pictures. What is wrong with it, in a sentence; None when nothing is."""
        try:
            try_out(self._loaded(), prompts, image_size)
        except UserError as error:
            return str(error)
        except Exception as error:
            if not is_the_workers(error):
                raise
            return str(the_machines(self.reward_name, error))
        except BaseException as error:  # noqa: BLE001  (a user's code may raise anything, and the user is told)
            return f"Reward {self.reward_name} failed on two pictures: it raised {describe(error)}; mend it."
        return None

    @judged
    def run(self, buffer: ray.actor.ActorHandle) -> None:
        """Works until the driver ends it. Raises UserError when the reward cannot be loaded, or answers in other types
        than before; and what its device or memory raises, which counts against no picture."""
        clock = Clock()
        with clock.on("loading the reward"):
            reward = self._loaded()
        while True:
            lease: Lease | None = ask(clock, "pictures", buffer.lease, self.reward_name, self.name)
            if lease is None:
                continue
            with clock.on("scoring"):
                table, reasons = self._score(reward, lease, buffer)
            with clock.on("handing in"):
                order = self.reward_name, lease.order_id, lease.table_digest
                if reasons:  # the order is offered again, until each of its pictures is scored or set aside
                    call(buffer.pictures_failed, *order, self.name, reasons)
                    if not table.num_rows:
                        raise NothingScored(f"not one picture of {lease.order_id} could be scored; a new process tries")
                else:
                    call(buffer.add_scores, *order, table)

    def _score(
        self, reward: NamedReward, lease: Lease, buffer: ray.actor.ActorHandle
    ) -> tuple[pa.Table, dict[int, str]]:
        """Scores of the pictures that take part, and by trajectory id why some have none."""
        ids = lease.table["trajectory_id"].to_numpy()
        wanted = np.flatnonzero(~np.isin(ids, lease.skip))
        shown = np.where(np.isin(ids, lease.skip), wanted[0], np.arange(len(ids)))  # so that slices keep their shape
        images = tensors_of(lease.table)["image"][shown]
        prompts = [lease.table["prompt"][int(row)].as_py() for row in shown]
        if lease.alone:
            return self._score_alone(reward, ids, images, prompts, wanted, buffer)
        scores, failed = score_order(reward, images, prompts, self.config.batch_size)
        scored = [row for row in range(len(ids)) if row not in failed]
        table = _table(ids[scored], scores)
        return table.filter(np.isin(scored, wanted)), {
            int(ids[row]): reason for row, reason in failed.items() if row in wanted
        }

    def _score_alone(
        self,
        reward: NamedReward,
        ids: np.ndarray,
        images: np.ndarray,
        prompts: list[str],
        wanted: np.ndarray,
        buffer: ray.actor.ActorHandle,
    ) -> tuple[pa.Table, dict[int, str]]:
        """Picture by picture, each announced first: if one kills this process, the buffer knows which."""
        tables: list[pa.Table] = []
        reasons: dict[int, str] = {}
        for row in wanted:
            call(buffer.trying_alone, self.name, int(ids[row]))
            scores, failed = score_rows(reward, images, prompts, [row], self.config.batch_size)
            tables.append(_table(ids[[row]] if not failed else ids[:0], scores))
            reasons |= {int(ids[row]): reason for reason in failed.values()}
        call(buffer.trying_alone, self.name, None)
        return pa.concat_tables(tables, promote_options="default"), reasons

    def _loaded(self) -> NamedReward:
        if self.reward is None:
            self.reward = resolve(self.reward_name, self.config.path, self.config.args)
        return self.reward


def _table(ids: np.ndarray, scores: Scores) -> pa.Table:
    return pa.table({"trajectory_id": ids, "score": scores.scores, **scores.columns})
