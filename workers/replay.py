"""Replay: a new LoRA from the trajectories of runs that are over, without a new sample.

    python launch.py replay from=runs/a,runs/b learner.objective=rwr

It is a run like any other, with the same buffer, learner, evaluations, guard and report. Only batches are not rolled
out and scored: their orders are filled with stored trajectories and their stored scores (`Replay.rollout`,
`Replay.scores`). Which trajectory a batch has follows from the run's seed: one pass over all of them after another,
each in an order of its own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np
import pyarrow as pa

from buffer.orders import Order, Plan
from buffer.schema import tensors_of
from buffer.settings import plan_of
from buffer.sources import Stored, sources, stored
from buffer.state import File
from buffer.store import read_arrow
from common.errors import RunStopped, UserError
from conf.schema import Config
from learner.objectives.objective import Needs
from policy.rollout import Rollout

STREAM = 3  # of random numbers beside buffer.orders' 0 and 1, and the objectives' 2
ORDERS_AT_HAND = 64  # whose tensors are open
LEAST_ESS = 0.1  # of a step's effective sample size, below which a policy gradient learns from a few paths alone


class Replay:
    """The trajectories that the runs in `run.replay` have kept."""

    def __init__(self, config: Config, needs: Needs) -> None:
        """Raises UserError as buffer/sources.py does, and where the objective needs paths and has none, or others."""
        self.needs = needs
        self.runs = sources(config)
        self.stored = stored(self.runs, config)
        for run in self.runs:
            if needs == "steps" and run.config.sampling != config.sampling:
                raise UserError(
                    f"{run.path} was made with sampling {run.config.sampling}, and this replay has {config.sampling}: "
                    "replay it by itself"
                )
        self.latents_dtype = np.dtype(config.sampling.latents_dtype.value)  # one, from whatever runs they come
        for place, latents in {one.run: one.latents for one in self.stored}.items():
            if needs == "steps" and "log_probs" not in self._table(place, latents):
                raise UserError(
                    f"{self.runs[place].path} has kept last latents alone, as its objective needed no paths: replay it "
                    "with a loss on clean pictures, such as learner.objective=rwr"
                )
        self.order: tuple[int, ...] = ()

    def plan(self, config: Config, prompts: Sequence[str]) -> Plan:
        """The run's plan, whose batches have the stored pairs of prompt and seed."""
        plan = plan_of(config, prompts)
        passes = -(-config.run.batches * plan.batch_size // len(self.stored))
        shuffled = [
            np.random.default_rng([plan.seed, STREAM, one]).permutation(len(self.stored)) for one in range(passes)
        ]
        self.order = tuple(int(place) for one in shuffled for place in one)
        ids = {prompt: place for place, prompt in enumerate(plan.prompts)}
        pairs = tuple((ids[self.stored[place].prompt], self.stored[place].seed) for place in self.order)
        # Two runs of one seed have the same pairs, and not the same bytes.
        names = tuple(f"{one.prompt}\t{one.seed}\t{one.latents.digest}\t{one.row}" for one in self.stored)
        return replace(plan, replayed=pairs, stored=names)

    def rollout(self, order: Order) -> Rollout:
        """What was stored of an order's trajectories. Raises RunStopped if a file of them is gone or damaged."""
        found = [self._tensors(self.stored[self.order[trajectory_id]]) for trajectory_id in order.trajectory_ids]

        def column(name: str) -> np.ndarray:
            return np.stack([tensors[name] for tensors in found])

        latents = column("latents").astype(self.latents_dtype, copy=False)
        none = np.empty((len(found), 0), np.float32)
        path = self.needs == "steps"
        return Rollout(
            latents=latents,
            timesteps=column("timesteps") if path else none,
            log_probs=column("log_probs") if path else none,
            images=column("image"),
        )

    def scores(self, reward: str, trajectory_ids: Sequence[int]) -> pa.Table:
        """Stored scores, as a scorer hands them in, without what a reward stored beside them."""
        scores = [self.stored[self.order[trajectory_id]].scores[reward] for trajectory_id in trajectory_ids]
        return pa.table(
            {"trajectory_id": pa.array(trajectory_ids, pa.int64()), "score": pa.array(scores, pa.float32())}
        )

    def check(self, rows: Sequence[Mapping[str, float]]) -> None:
        """Raises RunStopped where a policy gradient hardly learns from these paths. rows: of metrics.jsonl."""
        share = next((row["ess/step"] for row in reversed(rows) if "ess/step" in row), 1.0)
        if share < LEAST_ESS:
            raise RunStopped(
                f"The effective sample size of a denoising step is {share:.2g} of the batch: the paths are of policies "
                "too far from the one that is trained, and a few of them count for all. Take a loss on clean pictures "
                "(learner.objective=rwr, nft or awm), or replay other runs."
            )

    @lru_cache(maxsize=ORDERS_AT_HAND)  # noqa: B019  (a run has one Replay, and it lives as long as the run)
    def _table(self, run: int, file: File) -> dict[str, np.ndarray]:
        table = read_arrow(self.runs[run].path, file)
        if table is None:
            raise RunStopped(f"{self.runs[run].path / file.path} is gone or damaged: put it back, and go on")
        return tensors_of(table)

    def _tensors(self, one: Stored) -> dict[str, np.ndarray]:
        tensors = {**self._table(one.run, one.latents), **self._table(one.run, one.images)}
        row = {name: array[one.row] for name, array in tensors.items()}
        return row if self.needs == "steps" else {**row, "latents": row["latents"][-1:]}
