"""The claims of the DDPO paper (Black et al. 2023, sections 6.1 to 6.3), each checked by one command:

    python -m studies.paper race               policy gradients against reward-weighted regression, on four rewards
    python -m studies.paper generalisation     trained on two thirds of the animals, measured on what is new
    python -m studies.paper overoptimisation   until the pictures are gone, and what the guard keeps
    python -m studies.paper style              the pictures of one seed before and after

makes the runs that are missing (studies/cells.py), prints a table and draws docs/images/paper_<part>.svg.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from evaluation.guard import best_by, judge
from evaluation.history import history, verdict
from evaluation.tradeoff import knee
from report.svg import Panel, figure
from studies.algorithms import ALGORITHMS
from studies.cells import PLAIN, Cell, make, study
from studies.curves import Seeds, gains, last, means, over_seeds, run_of, shown, table

SEEDS = (0, 1, 2)
BATCH = 64  # pictures
IMAGES = Path(__file__).resolve().parent.parent / "docs" / "images"

REWARDS = ("compressibility", "incompressibility", "aesthetic", "alignment")
# The paper's two policy gradients and its two baselines, each at the learning rate that studies/algorithms.py chose for
# it on compressibility, by a seed that is not in this race.
RATES = {"DDPO_SF": "2e-3", "DDPO_IS": "4e-3", "RWR": "2e-3", "RWR-sparse": "4e-3"}
METHODS = {name: (*ALGORITHMS[name], f"learner.lr={rate}") for name, rate in RATES.items()}
RACE = (
    *PLAIN,
    "run.batches=20",
    "evaluation.every=5",
    "evaluation.count=128",
    "evaluation.sets={}",
    "evaluation.scales=[]",
    "guard.action=note",
)
SETS = {
    "train": "trained prompts",
    "held_out_animals": "new animals",
    "held_out_activities": "a new activity",
    "places": "places",
    "objects": "inanimate objects",
}
# Both rewards until they are won by other means; the guard only takes notes, so that both ends are in one run. At the
# knee of compressibility two batches gain a fifth of all that is to be kept, so every version is looked at.
HACKED: dict[str, tuple[str, ...]] = {
    "compressibility": ("run.batches=40", "evaluation.every=1"),
    "counting": ("run.batches=80", "evaluation.every=4", "evaluation.count=128"),
}
# What is lost: all that a prompt says; of "two cats on a bike" the bike, which no question asks for.
JUDGED = {"compressibility": "judge", "counting": "judge.setting"}


def race(folder: Path) -> tuple[list[Cell], Callable[[], str]]:
    """Reward against reward queries, and what is left of the pictures."""
    cells = {
        (reward, method, seed): Cell(f"{reward}-{method}-{seed}", (reward, *words, *RACE, f"run.seed={seed}"))
        for reward in REWARDS
        for method, words in METHODS.items()
        for seed in SEEDS
    }

    def drawn() -> str:
        panels: list[list[Panel]] = []
        rows: dict[str, list[str]] = {}
        for reward in REWARDS:
            found = {
                method: Seeds.read([folder / cells[reward, method, seed].name for seed in SEEDS]) for method in METHODS
            }
            race = [over_seeds(method, each.gained, lambda version: version * BATCH) for method, each in found.items()]
            frontier = [each.frontier(method) for method, each in found.items()]
            panels.append(
                [
                    (f"{reward}: gain in base stds", race, "reward queries"),
                    ("right, by the judge", frontier, "gain in base stds"),
                ]
            )
            rows |= {f"{reward}, {method}": each.ends() for method, each in found.items()}
        _save("race", panels)
        return table(("", "gain in base stds", "right, by the judge"), rows)

    return list(cells.values()), drawn


def generalisation(folder: Path) -> tuple[list[Cell], Callable[[], str]]:
    """The gain on what is new, as a share of that on trained prompts."""
    every = [f"evaluation.sets.{name}.every=20" for name in SETS if name != "train"]
    words = ("alignment", *every, "guard.action=note")
    cells = [Cell(f"generalisation-{seed}", (*words, f"run.seed={seed}")) for seed in SEEDS]

    def drawn() -> str:
        seeds = {name: [gains(folder / cell.name, name) for cell in cells] for name in SETS}
        ends = {name: [last(points) for points in found] for name, found in seeds.items()}
        trained = ends["train"]
        rows = {
            words: [shown(ends[name]), shown([new / old for new, old in zip(ends[name], trained, strict=True)], ".2f")]
            for name, words in SETS.items()
        }
        curves = [over_seeds(words, seeds[name]) for name, words in SETS.items()]
        _save("generalisation", [[("alignment: gain in base stds", curves, "batches trained")]])
        return table(("pairs of", "gain in base stds", "of the gain on trained prompts"), rows)

    return cells, drawn


def overoptimisation(folder: Path) -> tuple[list[Cell], Callable[[], str]]:
    """What the judge calls right against what is gained, to the end; where the guard would have stopped."""
    cells = {
        (reward, seed): Cell(f"hacked-{reward}-{seed}", (reward, *words, "guard.action=note", f"run.seed={seed}"))
        for reward, words in HACKED.items()
        for seed in SEEDS
    }

    def drawn() -> str:
        rows: dict[str, list[str]] = {}
        panels: list[Panel] = []
        for reward in HACKED:
            paths = [folder / cells[reward, seed].name for seed in SEEDS]
            for seed, path in zip(SEEDS, paths, strict=True):
                rows[f"{reward}, seed {seed}"] = _kept(path, JUDGED[reward])
            read = {seed: Seeds.read([path], JUDGED[reward]) for seed, path in zip(SEEDS, paths, strict=True)}
            curves = [one.frontier(f"seed {seed}") for seed, one in read.items()]
            panels.append((f"{reward}: share that the judge calls right", curves, "gain in base stds"))
        _save("overoptimisation", [panels])
        head = (
            "",
            "judge: base, peak, end",
            "gain: knee, end",
            "stopped at",
            "best version",
            "gain there",
            "judge there",
        )
        return table(head, rows)

    return list(cells.values()), drawn


def _kept(path: Path, judged: str) -> list[str]:
    run, gained, right = run_of(path), gains(path), means(path, judged)
    at_knee = list(gained)[knee(list(gained.values()), list(right.values()))]
    stop = min(verdict(run.metrics, run.config).wrong, default=None)
    stopped = "never" if stop is None else str(stop)
    first = [seen for seen in history(run.metrics) if stop is None or seen.version <= stop]
    best = judge(first, run.config.guard, best_by(run.config)).best
    base, *_, end = right.values()
    return [
        f"{base:.0%}, {max(right.values()):.0%}, {end:.0%}",
        f"{gained[at_knee]:+.2f} (version {at_knee}), {last(gained):+.2f}",
        stopped,
        str(best),
        f"{gained[best]:+.2f}" + (f", {gained[best] / gained[at_knee]:.0%} of the knee's" if gained[at_knee] else ""),
        f"{right[best]:.0%}, {right[best] / max(right.values()):.0%} of the peak's",
    ]


def style(folder: Path) -> tuple[list[Cell], Callable[[], str]]:
    """The first evaluation grid beside the last, of one seed of the generalisation study."""
    cells, _ = generalisation(folder)

    def drawn() -> str:
        grids = run_of(folder / cells[0].name).grids["train"]
        before, after = (Image.open(grids[version]) for version in (min(grids), max(grids)))
        both = Image.new("RGB", (before.width + after.width + 24, before.height), (255, 255, 255))
        both.paste(before, (0, 0))
        both.paste(after, (before.width + 24, 0))
        both.save(IMAGES / "paper_style.png", optimize=True)
        ends = (min(grids), max(grids))
        settings = {
            f"seed {seed}": [
                f"{means(folder / cell.name, f'judge.{what}')[version]:.0%}"
                for what in ("animal", "setting")
                for version in ends
            ]
            for seed, cell in zip(SEEDS, cells, strict=True)
        }
        return table(("", "animal before", "after", "activity before", "after"), settings)

    return cells, drawn


def _save(part: str, rows: list[list[Panel]]) -> None:
    (IMAGES / f"paper_{part}.svg").write_text(figure(rows), encoding="utf-8")


PARTS = {part.__name__: part for part in (race, generalisation, overoptimisation, style)}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="studies.paper", description=__doc__)
    parser.add_argument("part", choices=PARTS)

    def work(args: argparse.Namespace) -> str:
        cells, drawn = PARTS[args.part](args.runs)
        make(cells, args.runs, args.at_once)
        return drawn()

    return study(parser, arguments, work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
