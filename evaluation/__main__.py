"""Evaluates a run again: any version that it evaluated, and its LoRA at scales from 0 to 1.

    python -m evaluation runs/compressibility [runs/another ...] [--version 30] [--set held_out] [--scales 0,0.5,1]

Prints each measure by scale, and where the knee is: from there on more is lost than gained. Draws both, and the same
pictures at each scale, into RUN/scales/, from where the report takes them.
"""

import argparse
import sys
from collections.abc import Sequence

import numpy as np

from buffer.run_folder import RunFolder, run_at
from common.commands import command, path_of
from common.errors import UserError
from common.files import write_atomically
from conf.evaluations import FIRST, sets_of
from evaluation.measures import DIVERSITY, measures
from evaluation.tradeoff import knee, table
from report.grids import grid
from report.report import write_report
from report.svg import Curve, figure

GAINED = "reward"  # what is trained on
SHOWN = 8  # pictures of each scale
LARGEST = 10  # scale of a LoRA that may still draw a picture


@command("evaluation")
def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m evaluation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=path_of, nargs="+")
    parser.add_argument("--version", type=int, help="by default the best one, of which lora_best/ is")
    parser.add_argument("--set", default=FIRST, help=f"an evaluation set of the run; by default {FIRST}")
    parser.add_argument("--scales", default="0,0.25,0.5,0.75,1", help="of the LoRA, by commas")
    parser.add_argument("--against", help="the measure that may be lost; by default the first that nobody trains on")
    args = parser.parse_args(arguments)
    for run in [run_at(path) for path in args.runs]:
        evaluate(run, args.set, args.version, _scales(args.scales), args.against)


def evaluate(run: RunFolder, name: str, version: int | None, scales: list[float], against: str | None) -> None:
    from evaluation.again import Again, kept_or_last  # not above: torch takes seconds that a typo need not wait for

    again = Again(run, name)
    version = kept_or_last(run) if version is None else version
    found, pictures = {}, []
    for scale in scales:
        found[f"{scale:g}"] = measures(again.at(version, scale))
        pictures.append(again.pictures[:SHOWN])
        print(f"{run.path}: scale {scale:g} is drawn and scored", file=sys.stderr, flush=True)
        names = [measure for measure in found[f"{scales[0]:g}"] if all(measure in each for each in found.values())]
        lost = _lost(run, name, names, against)  # what cannot be is said after the first scale
    print(f"{run.path}, version {version} on {name}, by the LoRA's scale\n\n{table(names, found)}\n")
    means = {measure: [float(each[measure].mean()) for each in found.values()] for measure in (GAINED, lost)}
    place = knee(means[GAINED], means[lost])
    print(f"The knee of {GAINED} against {lost} is at scale {scales[place]:g}.\n", flush=True)
    folder = run.path / "scales"
    folder.mkdir(exist_ok=True)
    curves = [
        Curve(f"version {version}", means[GAINED], means[lost], "points"),
        Curve(f"knee, scale {scales[place]:g}", [means[GAINED][place]], [means[lost][place]], "points"),
    ]
    title = f"{lost} against {GAINED}, by the LoRA's scale"
    write_atomically(folder / "tradeoff.svg", figure([[(title, curves, GAINED)]]))
    captions = [f"scale {scale:g}" if place == 0 else "" for scale in scales for place in range(len(pictures[0]))]
    grid(np.concatenate(pictures), captions, columns=len(pictures[0])).save(folder / "pictures.png", optimize=True)
    write_report(run.path)


def _lost(run: RunFolder, name: str, names: list[str], against: str | None) -> str:
    """What may be lost for the reward. Raises UserError if there is no such measure, or no reward."""
    if GAINED not in names:
        raise UserError(
            f"--set={name} does not measure what is trained on, so nothing is gained there: take another set"
        )
    trained = {GAINED, *(reward for reward, own in run.config.rewards.items() if own.weight)}
    untrained = {*sets_of(run.config)[name].rewards, DIVERSITY} - trained
    others = [measure for measure in names if measure in untrained]
    if against == GAINED:
        raise UserError(f"--against={against} is what is gained: name another measure of {', '.join(names)}")
    if against is not None and against not in names:
        raise UserError(f"--against={against} is not measured on {name}: there are {', '.join(names)}")
    if against is None and not others:
        raise UserError(
            f"on {name} nothing is measured but what is trained on, so there is no trade-off: begin another run with a "
            "second reward, such as rewards.clip.path=clip_score with rewards.clip.weight=null"
        )
    return against or others[0]


def _scales(text: str) -> list[float]:
    try:
        scales = sorted({float(part) for part in text.split(",")})
    except ValueError as error:
        raise UserError(f"--scales={text} are no numbers by commas, such as 0,0.5,1") from error
    if not all(0 <= scale <= LARGEST for scale in scales) or len({f"{scale:g}" for scale in scales}) < len(scales):
        raise UserError(f"--scales={text} must lie between 0 and {LARGEST}, each another: such as 0,0.5,1")
    return scales


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
