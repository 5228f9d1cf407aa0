"""Which algorithm is best: all objectives on one model and one reward, with equal effort of tuning.

    python -m studies.algorithms [--runs runs/algorithms]

Each has one setting that is tuned, on the same grid for all: the learning rate. It is chosen on a seed of its own, by
the largest gain at a version where the judge still calls nine tenths of the base model's right pictures right; three
other seeds are then made with it. What a batch costs is timed at the end, one algorithm at a time: let nothing else
compute then. Makes what is missing, prints a table, and draws docs/images/algorithms.svg: gain against pictures, gain
against seconds of training, and what the judge calls right against the gain. The frontier counts, not the race.
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from operator import mul
from pathlib import Path

import numpy as np

from report.svg import Panel, figure
from studies.cells import PLAIN, Cell, make, study
from studies.curves import Points, Seeds, gains, means, over_seeds, run_of, shown, table

LEARNING_RATES = ("1e-4", "2e-4", "5e-4", "1e-3", "2e-3", "4e-3", "8e-3")
TUNING, SEEDS = 100, (0, 1, 2)
STILL_RIGHT = 0.9  # of the base model's share
BATCH = 64
COMMON = (
    *PLAIN,
    "run.batches=24",
    "evaluation.every=3",
    "evaluation.sets={}",
    "evaluation.scales=[]",
    "guard.action=note",
)
TIMED = 6  # batches
BY_STD = ("learner.objective=ddpo_is", "learner.objective_args={step_weight: std}")
GROUPS = ("buffer.group_size=4", "learner.advantage=by_group", "learner.advantage_args.std=batch")
ONE_START = (*GROUPS, "sampling.same_noise=true", "learner.train_share=0.5")
KL = "learner.kl_weight=0.006"
# The regressions make two passes over a batch. Rewards differ here by tenths where the paper's differ by units, so the
# softmax has a larger temperature (it multiplies).
ALGORITHMS: dict[str, tuple[str, ...]] = {
    "DDPO_SF": ("learner.objective=ddpo_sf", "learner.objective_args={}", "learner.optimizer_steps=1"),
    "DDPO_IS": ("learner.objective=ddpo_is", "learner.objective_args={}"),
    "DDPO_IS, by σ": BY_STD,
    "DDPO_IS, by σ, by group": (*BY_STD, *GROUPS),
    "DDPO_IS, by σ, by group of one start": (*BY_STD, *ONE_START),
    "DDPO_IS, by σ, by group of one start, KL": (*BY_STD, *ONE_START, KL),
    "DDPO_IS, by σ, KL": (*BY_STD, KL),
    "RWR": ("learner.objective=rwr", "learner.objective_args={temperature: 5.0, passes: 2}"),
    "RWR-sparse": ("learner.objective=rwr_sparse", "learner.objective_args={passes: 2}"),
    "NFT": ("learner.objective=nft", "learner.kl_weight=0.1"),
    "AWM": ("learner.objective=awm", "learner.kl_weight=0.1"),
}
IMAGE = Path(__file__).resolve().parent.parent / "docs" / "images" / "algorithms.svg"


def cell(name: str, rate: str, seed: int) -> Cell:
    words = ("compressibility", *COMMON, *ALGORITHMS[name], f"learner.lr={rate}", f"run.seed={seed}")
    return Cell(f"{_folder(name)}-{rate}-{seed}", words)


def timed(name: str) -> Cell:
    """A short run for its clock alone."""
    words = ("compressibility", *COMMON, *ALGORITHMS[name], f"run.batches={TIMED}", f"evaluation.every={TIMED}")
    return Cell(f"{_folder(name)}-timed", words)


def _folder(name: str) -> str:
    return name.replace(", ", "-").replace(" ", "-").replace("σ", "std")


def best_while_right(gained: Points, right: Points) -> float:
    """The largest gain among versions at which enough pictures are still right."""
    enough = STILL_RIGHT * right[min(right)]
    return max(gain for version, gain in gained.items() if right[version] >= enough)


def best_rate(name: str, folder: Path) -> str:
    def reached(rate: str) -> float:
        path = folder / cell(name, rate, TUNING).name
        return best_while_right(gains(path), means(path, "judge"))

    return max(LEARNING_RATES, key=reached)


def drawn(rates: dict[str, str], folder: Path) -> str:
    paths = {name: [folder / cell(name, rate, seed).name for seed in SEEDS] for name, rate in rates.items()}
    found = {name: Seeds.read(each) for name, each in paths.items()}
    cost = {name: _seconds_a_batch(folder / timed(name).name) for name in rates}
    panels: list[list[Panel]] = []
    for names in (list(rates)[:5], list(rates)[5:]):  # as many curves as can be told apart
        pictures = [over_seeds(name, found[name].gained, lambda version: version * BATCH) for name in names]
        seconds = [over_seeds(name, found[name].gained, partial(mul, cost[name])) for name in names]
        frontier = [found[name].frontier(name) for name in names]
        panels.append(
            [
                ("gain in base stds", pictures, "pictures"),
                ("gain in base stds", seconds, "seconds"),
                ("right, by the judge", frontier, "gain in base stds"),
            ]
        )
    IMAGE.write_text(figure(panels), encoding="utf-8")
    rows = {
        name: [
            rates[name],
            *seeds.ends(),
            shown([best_while_right(g, r) for g, r in zip(seeds.gained, seeds.right, strict=True)]),
            f"{cost[name]:.2f}",
        ]
        for name, seeds in found.items()
    }
    head = (
        "algorithm",
        "learning rate",
        "gain at the end",
        "right at the end",
        "best gain while nine tenths are right",
        "seconds a batch",
    )
    return table(head, rows)


def _seconds_a_batch(path: Path) -> float:
    """The median time from one batch to the next: of sampling, scoring and training in one thread."""
    return float(np.median(np.diff([row["time"] for row in run_of(path).batches])))


def work(args: argparse.Namespace) -> str:
    make([cell(name, rate, TUNING) for name in ALGORITHMS for rate in LEARNING_RATES], args.runs, args.at_once)
    rates = {name: best_rate(name, args.runs) for name in ALGORITHMS}
    make([cell(name, rate, seed) for name, rate in rates.items() for seed in SEEDS], args.runs, args.at_once)
    make([timed(name) for name in ALGORITHMS], args.runs, at_once=1)
    return drawn(rates, args.runs)


def main(arguments: Sequence[str]) -> int:
    return study(argparse.ArgumentParser(prog="studies.algorithms", description=__doc__), arguments, work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
