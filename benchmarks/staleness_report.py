"""The table and the figure of docs/asynchrony.md, from the results of benchmarks/staleness.py.

    python -m benchmarks.staleness_report [runs/staleness.jsonl] [--figure docs/images/staleness.svg]

The gain is the mean rise of the reward within the fixed evaluation pairs, in standard deviations of the base model's
rewards over them. Everything is given as mean ± standard error over seeds. Seeds share their pairs across cells, so the
difference to k = 0 is taken seed by seed.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.staleness import AGES, RESULTS, SEEDS, Cell, finished
from common.terminal import print_anywhere
from conf.load import load
from report.svg import Curve, figure
from studies.curves import over_seeds, shown, spread

NAMES = {False: "plain", True: "decoupled"}
HEAD = (
    "| k | objective | gain in base stds | difference to k = 0 | KL to the base model, nats | outside the clip range "
    "| effective sample size of a step |\n|---|---|---|---|---|---|---|"
)
Lines = list[dict[str, Any]]  # of one (k, objective), by seed


def grouped(lines: dict[Cell, dict[str, Any]]) -> dict[tuple[int, bool], Lines]:
    """By (k, decoupled), as far as they are there; k = 0 is both objectives' and stands under False."""
    variants = [(k, decoupled) for k in AGES for decoupled in ((False, True) if k else (False,))]
    return {variant: [lines[c] for c in (Cell(s, *variant) for s in SEEDS) if c in lines] for variant in variants}


def gains(line: dict[str, Any]) -> dict[int, float]:
    """Version -> gain in base stds."""
    rewards = {int(version): np.array(values) for version, values in line["evaluations"].items()}
    return {
        version: float((values - rewards[0]).mean() / rewards[0].std(ddof=1)) for version, values in rewards.items()
    }


def table(study: dict[tuple[int, bool], Lines]) -> str:
    """Markdown. KL of the last batch; clipping and effective sample size are means over the batches."""
    rows = [HEAD]
    fresh = {line["seed"]: last_gain(line) for line in study[0, False]}
    for (k, decoupled), lines in study.items():
        difference = [last_gain(line) - fresh[line["seed"]] for line in lines]
        cells = [
            str(k),
            NAMES[decoupled] if k else "either",
            shown([last_gain(line) for line in lines]),
            shown(difference) if k else "",
            shown([line["batches"][-1]["kl/base"] for line in lines], ".0f"),
            *(shown([_mean(line, name) for line in lines], ".2f") for name in ("clip_fraction", "ess/step")),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def last_gain(line: dict[str, Any]) -> float:
    return list(gains(line).values())[-1]


def _mean(line: dict[str, Any], name: str) -> float:
    return float(np.mean([batch[name] for batch in line["batches"]]))


def drawing(study: dict[tuple[int, bool], Lines]) -> str:
    """SVG: above the gain at the end against k, below the way there with each objective."""
    by_age = [_curve_by_age(study, decoupled) for decoupled in (False, True)]
    by_batch = [
        (
            f"gain in base stds, {NAMES[decoupled]}",
            [over_seeds(f"k = {k}", [gains(line) for line in study[k, decoupled and k > 0]]) for k in AGES],
            "batches trained",
        )
        for decoupled in (False, True)
    ]
    return figure([[("gain in base stds, after all batches, by k", by_age, "k")], by_batch])


def _curve_by_age(study: dict[tuple[int, bool], Lines], decoupled: bool) -> Curve:
    ends = [spread([last_gain(line) for line in study[k, decoupled and k > 0]]) for k in AGES]
    return Curve(NAMES[decoupled], AGES, [mean for mean, _ in ends], "points", [error for _, error in ends])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="?", default=RESULTS)
    parser.add_argument("--figure", type=Path, help="where to draw the figure, an SVG file")
    args = parser.parse_args()
    lines = finished(args.results)
    study = grouped(lines)
    missing = sum(len(SEEDS) - len(found) for found in study.values())
    if not all(study.values()):
        parser.error(f"{args.results} lacks {missing} cells, all seeds of some k: run python -m benchmarks.staleness")
    if missing:
        print(f"UNFINISHED: {missing} cells are missing\n")
    config = load(next(iter(lines.values()))["settings"])
    samples = config.run.batches * config.buffer.batch_size
    print(
        f"After {config.run.batches} batches, {samples:,} samples; {config.evaluation.count} evaluation pairs a seed."
    )
    machines = " and ".join(dict.fromkeys(line["machine"] for line in lines.values()))
    print(f"Computed on {machines}.\n\n{table(study)}")
    if args.figure:
        args.figure.write_text(drawing(study), encoding="utf-8")


if __name__ == "__main__":
    print_anywhere()
    main()
