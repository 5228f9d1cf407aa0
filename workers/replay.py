"""Replay: a new LoRA from the trajectories of runs that are over, without a new sample.

    python launch.py replay from=runs/a,runs/b learner.objective=rwr

It is a run like any other, with the same buffer, learner, evaluations, guard and report. Only batches are not rolled
out and scored: their orders are filled with stored trajectories and their stored scores (`Replay.rollout`,
`Replay.scores`). Which trajectory a batch has follows from the run's seed: one pass over all of them after another,
each in an order of its own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa

from buffer.orders import Order, Plan
from buffer.run_folder import RunFolder
from buffer.schema import tensors_of
from buffer.settings import plan_of
from buffer.state import File, work_of
from buffer.store import read_arrow
from common.errors import RunStopped, UserError
from conf.evaluations import trained_rewards
from conf.places import by_name
from conf.resume import RunLock
from conf.schema import Config
from learner.objectives.objective import Needs
from policy.rollout import Rollout

STREAM = 3  # of random numbers beside buffer.orders' 0 and 1, and the objectives' 2
ORDERS_AT_HAND = 64  # whose tensors are open
LEAST_ESS = 0.1  # of a step's effective sample size, below which a policy gradient learns from a few paths alone


@dataclass(frozen=True)
class Stored:
    """A trajectory of a run."""

    run: int  # which of the runs
    prompt: str
    seed: int
    images: File
    latents: File
    row: int  # within both
    scores: dict[str, float]  # by reward


class Replay:
    """The trajectories that the runs in `run.replay` have kept."""

    def __init__(self, config: Config, needs: Needs) -> None:
        """Raises UserError where a run is none, is of another model or other rewards, or has kept too little."""
        self.needs = needs
        self.runs = [_opened(Path(path), config, needs) for path in config.run.replay or []]
        rewards = trained_rewards(config)
        self.stored = [each for place, run in enumerate(self.runs) for each in _stored(place, run, rewards)]
        if len(self.stored) < config.buffer.batch_size:
            raise UserError(
                f"{', '.join(str(run.path) for run in self.runs)} have kept the tensors of {len(self.stored)} "
                f"trajectories, fewer than a batch ({config.buffer.batch_size}): a run keeps those of its last "
                "buffer.keep_batches batches, so raise that in a run that is to be replayed"
            )
        self.latents_dtype = np.dtype(config.sampling.latents_dtype.value)  # one, from whatever runs they come
        for run, latents in {one.run: one.latents for one in self.stored}.items():
            if needs == "steps" and "log_probs" not in self._table(run, latents):
                raise UserError(
                    f"{self.runs[run].path} has kept last latents alone, as its objective needed no paths: replay it "
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
        stored = tuple(f"{one.prompt}\t{one.seed}\t{one.latents.digest}\t{one.row}" for one in self.stored)
        return replace(plan, replayed=pairs, stored=stored)

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


def _opened(path: Path, config: Config, needs: Needs) -> RunFolder:
    """A run that fits: what was sampled must mean the same to the policy that is trained."""
    run = RunFolder(path)
    if not (path / "config.yaml").is_file():
        raise UserError(f"run.replay names {path}, which is no run (no config.yaml in it)")
    if RunLock(path).is_held():
        raise UserError(f"run.replay names {path}, which still goes on: wait until it is over")
    theirs = run.config
    same: list[tuple[str, object, object]] = [("model", replace(theirs.model, lora=config.model.lora), config.model)]
    if needs == "steps":
        same.append(("sampling", theirs.sampling, config.sampling))
    for name, there, here in same:
        if there != here:
            raise UserError(f"{path} was made with {name} {there}, and this replay has {here}: replay it by itself")
    for name in trained_rewards(config):
        if name not in trained_rewards(theirs):
            raise UserError(f"{path} has no scores of {name}: it was trained on {', '.join(trained_rewards(theirs))}")
        there, here = (each.rewards[name] for each in (theirs, config))
        if (by_name(there.path), there.args) != (by_name(here.path), here.args):
            raise UserError(
                f"{path} has scores of another reward {name}, {there.path} {there.args} and not {here.path} "
                f"{here.args}: replay it by itself"
            )
    return run


def _stored(place: int, run: RunFolder, rewards: Sequence[str]) -> list[Stored]:
    found: list[Stored] = []
    rows_of: dict[str, list[dict[str, object]]] = {}
    for row in run.trajectories().to_pylist():
        rows_of.setdefault(str(row["order_id"]), []).append(row)
    for order_id, rows in rows_of.items():
        rollout = work_of(run.state, order_id).rollout
        if rollout is None or rollout.latents is None:
            continue
        if not all((run.path / file.path).exists() for file in (rollout.images, rollout.latents)):
            continue
        first = min(int(str(row["trajectory_id"])) for row in rows)
        for row in rows:
            scores = {name: float(str(row[name])) for name in rewards if row.get(name) is not None}
            if row["set_aside"] is None and len(scores) == len(rewards):
                at = int(str(row["trajectory_id"])) - first
                seed = int(str(row["seed"]))
                found.append(Stored(place, str(row["prompt"]), seed, rollout.images, rollout.latents, at, scores))
    return found
