"""What single settings do: each by itself is changed in the shipped compressibility experiment (pictures without a
group also have starts of their own, and are compared with earlier ones of their prompt).

    python -m studies.settings [--runs runs/settings]

Makes what is missing, prints a table, and draws docs/images/settings.svg: for each setting the gain by batches trained,
and what the judge calls right against the gain. Age of data has a study of its own: benchmarks/staleness.py.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from report.svg import Panel, figure
from studies.cells import ALONE, Cell, make, study
from studies.curves import Seeds, over_seeds, table

SEEDS = (0, 1, 2)
COMMON = ("run.batches=20", "evaluation.every=4", "evaluation.sets={}", "evaluation.scales=[]", "guard.action=note")
SHIPPED: tuple[str, ...] = ()
VARIED: dict[str, dict[str, tuple[str, ...]]] = {
    "clip range": {
        "1e-3": ("learner.clip_range=1e-3",),
        "5e-3": SHIPPED,
        "2.5e-2": ("learner.clip_range=2.5e-2",),
    },
    "steps trained, of six": {
        "2": ("learner.train_steps=2",),
        "4": ("learner.train_steps=4",),
        "6": SHIPPED,
    },
    "pictures of one start": {
        "1": ALONE,
        "2": ("buffer.group_size=2",),
        "4": SHIPPED,
        "8": ("buffer.group_size=8",),
    },
    "guidance": {
        "1": SHIPPED,
        "2": ("sampling.guidance=2",),
        "4": ("sampling.guidance=4",),
    },
}
IMAGE = Path(__file__).resolve().parent.parent / "docs" / "images" / "settings.svg"


def cells(setting: str, value: str) -> list[Cell]:
    """One a seed. What is shipped is one cell, whatever setting it is compared by."""
    words = VARIED[setting][value]
    name = f"{setting.replace(',', '').replace(' ', '-')}-{value}" if words else "shipped"
    return [Cell(f"{name}-{seed}", ("compressibility", *COMMON, *words, f"run.seed={seed}")) for seed in SEEDS]


def every_cell() -> list[Cell]:
    return list({cell.name: cell for s, values in VARIED.items() for v in values for cell in cells(s, v)}.values())


def drawn(folder: Path) -> str:
    rows: dict[str, list[str]] = {}
    panels: list[list[Panel]] = []
    for setting, values in VARIED.items():
        found = {value: Seeds.read([folder / cell.name for cell in cells(setting, value)]) for value in values}
        race = [over_seeds(value, seeds.gained) for value, seeds in found.items()]
        frontier = [seeds.frontier(value) for value, seeds in found.items()]
        panels.append(
            [
                (f"{setting}: gain in base stds", race, "batches trained"),
                ("right, by the judge", frontier, "gain in base stds"),
            ]
        )
        rows |= {f"{setting}: {value}": seeds.ends() for value, seeds in found.items()}
    IMAGE.write_text(figure(panels), encoding="utf-8")
    return table(("", "gain in base stds", "right, by the judge"), rows)


def work(args: argparse.Namespace) -> str:
    make(every_cell(), args.runs, args.at_once)
    return drawn(args.runs)


def main(arguments: Sequence[str]) -> int:
    return study(argparse.ArgumentParser(prog="studies.settings", description=__doc__), arguments, work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
