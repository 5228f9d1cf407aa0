"""What old data cost: the reward after equal samples for max_staleness 0, 1, 2, 4 and 8, plain and decoupled.

    python -m benchmarks.staleness [runs/staleness.jsonl]            the study; goes on where it was interrupted
    python -m benchmarks.staleness_report [runs/staleness.jsonl]     its table and figure

A cell is one (max_staleness, objective, seed): the real rollout, reward and learner in one process, without Ray, so
that ages are no accident of timing. Batch u is always rolled out at version max(0, u - k), the oldest that rule 1 of
the buffer admits; a real run's data are of that age or younger. Every cell has one torch thread, and its numbers do
not depend on what runs beside it.

With k = 0 the decoupled objective's proximal policy is the one that sampled, so both objectives are one cell.
"""

import argparse
import json
import multiprocessing
import os
import time
from collections import deque
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from buffer.orders import Evaluation, Order, Plan
from buffer.settings import plan_of
from common.commands import at_least_1
from common.machine import describe, machine_info
from common.terminal import print_anywhere
from conf.evaluations import FIRST
from conf.load import load
from conf.prompts import resolve_prompts
from conf.schema import Config
from learner.batch import Batch, groups_of
from learner.learner import Learner
from policy.policy import Policy
from policy.rollout import rollout
from rewards.base import NamedReward, score_order
from rewards.registry import resolve
from studies.cells import PLAIN

RESULTS = Path("runs/staleness.jsonl")
REWARD = "compressibility"
# The shipped experiment, with all steps alike, no groups and no penalty. docs/asynchrony.md says how these were chosen.
SETTINGS = [REWARD, "run.batches=30", "evaluation.every=10", "learner.objective_args={}", *PLAIN]
AGES = (0, 1, 2, 4, 8)
SEEDS = (0, 1, 2)


class Cell(NamedTuple):
    seed: int
    max_staleness: int
    decoupled: bool


CELLS = [Cell(seed, k, decoupled) for seed in SEEDS for k in AGES for decoupled in ((False, True) if k else (False,))]


def settings(cell: Cell) -> list[str]:
    """The command line of a run with the cell's settings."""
    return [
        *SETTINGS,
        f"run.seed={cell.seed}",
        f"buffer.max_staleness={cell.max_staleness}",
        f"learner.objective={'ddpo_decoupled' if cell.decoupled else 'ddpo_is'}",
    ]


def run(cell: Cell) -> dict[str, Any]:
    """One line of the results: the cell, its evaluations, and every batch's metrics."""
    started = time.monotonic()
    config = load(settings(cell))
    plan = plan_of(config, resolve_prompts(config.prompts))
    reward = resolve(REWARD, config.rewards[REWARD].path, config.rewards[REWARD].args)
    sampler = _policy(config, trainable=False)
    learner = Learner(_policy(config, trainable=True), config)
    weights = deque([learner.policy.lora_state()], maxlen=cell.max_staleness + 1)  # of versions max(0, u - k) to u
    evaluations, batches = {0: _evaluate(sampler, plan, reward)}, []
    for u in range(config.run.batches):
        sampler.load_lora_state(weights[0])
        batch = _batch(u, min(u, cell.max_staleness), plan.batch(u), sampler, reward)
        batches.append(learner.train(batch).metrics)
        weights.append(learner.policy.lora_state())
        version = learner.version.number
        if version % config.evaluation.every == 0 or version == config.run.batches:
            sampler.load_lora_state(weights[-1])
            evaluations[version] = _evaluate(sampler, plan, reward)
    return {
        **cell._asdict(),
        "settings": settings(cell),
        "evaluations": {version: rewards.tolist() for version, rewards in evaluations.items()},
        "batches": batches,
        "seconds": round(time.monotonic() - started),
        "machine": describe(machine_info()),
    }


def _policy(config: Config, trainable: bool) -> Policy:
    return Policy.load(config.model, config.sampling, config.run.seed, "cpu", trainable)


def _batch(number: int, age: int, orders: Iterable[Order], policy: Policy, reward: NamedReward) -> Batch:
    """What the buffer would hand to the learner."""
    orders = list(orders)
    prompts = tuple(prompt for order in orders for prompt in order.prompts)
    made = [rollout(policy, order.prompts, order.seeds) for order in orders]
    rewards = np.concatenate([_score(reward, m.images, o.prompts) for m, o in zip(made, orders, strict=True)])
    return Batch(
        number=number,
        prompts=prompts,
        rewards=rewards,
        parts={reward.name: rewards},
        groups=groups_of(np.arange(len(prompts)), prompts, group_size=1),
        ages=np.full(len(rewards), age, np.int32),
        ages_in_flight=np.full(len(rewards), age, np.int32),
        latents=np.concatenate([m.latents for m in made]),
        log_probs=np.concatenate([m.log_probs for m in made]),
    )


def _evaluate(policy: Policy, plan: Plan, reward: NamedReward) -> np.ndarray:
    """Rewards, float32, of the fixed evaluation pairs, which are the same at every version."""
    orders = plan.evaluation(Evaluation(0, FIRST))
    return np.concatenate([_score(reward, rollout(policy, o.prompts, o.seeds).images, o.prompts) for o in orders])


def _score(reward: NamedReward, images: np.ndarray, prompts: tuple[str, ...]) -> np.ndarray:
    scores, failed = score_order(reward, images, prompts, len(prompts))
    if failed:
        raise RuntimeError(f"the reward gave no score: {failed}")
    return scores.scores


def finished(path: Path) -> dict[Cell, dict[str, Any]]:
    """The lines of a results file by cell. A line that was cut off by a crash is left out."""
    found: dict[Cell, dict[str, Any]] = {}
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        cell = Cell(line["seed"], line["max_staleness"], line["decoupled"])
        if line["settings"] != settings(cell):
            raise SystemExit(f"{path} holds {cell} with other settings, {line['settings']}: take another file.")
        found[cell] = line
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="?", default=RESULTS)
    parser.add_argument("--workers", type=at_least_1, default=len(os.sched_getaffinity(0)), help="cells at a time")
    args = parser.parse_args()
    args.results.parent.mkdir(parents=True, exist_ok=True)
    left = [cell for cell in CELLS if cell not in finished(args.results)]
    print(f"{len(left)} of {len(CELLS)} cells to run, {args.workers} at a time", flush=True)
    # spawned, because torch's threads do not survive a fork
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.workers, spawn, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for done in as_completed([pool.submit(run, cell) for cell in left]):
            line = done.result()
            with args.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            base, *_, last = line["evaluations"].values()
            change = np.mean(np.subtract(last, base))
            cell = Cell(line["seed"], line["max_staleness"], line["decoupled"])
            print(f"{cell}: reward {change:+.3f} in {line['seconds']} s", flush=True)


if __name__ == "__main__":
    print_anywhere()
    main()
