"""What Emoji World's classifier, which no reward ever uses, sees in a run's evaluation pictures before and after.

    python -m emoji_world.judge runs/compressibility [runs/another ...] [--picture before_after.png]

Prints a Markdown row a run. A reward that was won by pictures which no longer show their prompts is seen here.
"""

import argparse
import math
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from buffer.run_folder import RunFolder, run_at
from common.commands import command, path_of
from common.errors import UserError, shown
from evaluation.measures import pairs_of
from evaluation.summary import Comparison, compare
from policy.source import WEIGHT_NAME
from prompts.scenes import parse
from report.grids import captions_of, grid

HEAD = (
    "| run | batches | before: mean ± std | after: mean ± std | gain in base stds ± standard error "
    "| animal | number | setting | all three | commonest setting |\n|---|---|---|---|---|---|---|---|---|---|"
)
SHOWN = 8  # pairs in the picture


def pictures(run_dir: Path, after: bool) -> tuple[list[str], np.ndarray]:
    """Prompts and pictures, uint8 [n, H, W, 3], of a run's evaluation pairs, rolled out again: by the model that
    it began with, or with the run's LoRA."""
    from policy.policy import Policy  # here and below: who names no run need not wait for torch
    from policy.rollout import rollout

    run = RunFolder(run_dir)
    config, rows = run.config, next(iter(run.evaluations.values()))
    prompts, seeds = rows["prompt"].to_pylist(), rows["seed"].to_pylist()
    policy = Policy.load(config.model, config.sampling, config.run.seed, "cpu", trainable=False)
    if after:
        policy.load_lora(run_dir / "lora", f"The run's LoRA {run_dir / 'lora'}")
    size = config.buffer.order_size
    chunks = [slice(start, start + size) for start in range(0, len(prompts), size)]
    return prompts, np.concatenate([rollout(policy, prompts[chunk], seeds[chunk]).images for chunk in chunks])


def row(run_dir: Path, change: Comparison, prompts: list[str], before: np.ndarray, after: np.ndarray) -> str:
    """One run's line of the Markdown table, from its pictures before and after; shares as per cent."""
    from emoji_world.classifier import accuracy

    judged = [accuracy(images, prompts) for images in (before, after)]
    shares = [
        [f"{getattr(seen, name):.0%}" for seen in judged] for name in ("animal", "number", "setting", "all_three")
    ]
    cells = [
        run_dir.name,
        str(change.after),
        *[
            f"{mean:z.3f} ± {std:.3f}" if math.isfinite(std) else f"{mean:z.3f}"
            for mean, std in ((change.before_mean, change.before_std), (change.after_mean, change.after_std))
        ],
        _gain(change),
        *[" → ".join(pair) for pair in [*shares, [commonest_setting(before), commonest_setting(after)]]],
    ]
    return f"| {' | '.join(cells)} |"


def _gain(change: Comparison) -> str:
    if not math.isfinite(change.gain):
        return change.why_no_gain
    return f"{change.gain:+z.2f} ± {change.standard_error / change.before_std:.2f}"


def commonest_setting(images: np.ndarray) -> str:
    """The setting seen in most pictures, and in how many of them: where a policy flees to, if it does."""
    from emoji_world.classifier import classify

    ((setting, count),) = Counter(scene.setting or "none" for scene in classify(images)).most_common(1)
    return f"{setting} {count / len(images):.0%}"


def draw(run_dir: Path, before: np.ndarray, after: np.ndarray) -> Image.Image:
    """The first pairs, not chosen: before over after, with the prompts and what rewards said of each picture."""
    return grid(np.concatenate([before[:SHOWN], after[:SHOWN]]), captions(run_dir), columns=SHOWN)


def captions(run_dir: Path) -> list[str]:
    """Of the first evaluation's first pairs: as that one has them, then as the last has them, pair by pair."""
    run = RunFolder(run_dir)
    rewards, evaluations = tuple(run.config.rewards), list(run.evaluations.values())
    pairs = pairs_of(evaluations[0])[:SHOWN]
    found = []
    for rows in (evaluations[0], evaluations[-1]):
        of_pair = dict(zip(pairs_of(rows), captions_of(rows, rewards), strict=True))
        found += [of_pair.get((prompt, seed), prompt) for prompt, seed in pairs]
    return found


def checked(run_dir: Path) -> Comparison:
    """Raises UserError for a run that cannot be judged, before anything is drawn."""
    run = run_at(run_dir)
    change = compare(run_dir)
    if change is None:
        raise UserError(f"{run_dir} has no two evaluations to compare")
    try:
        for prompt in next(iter(run.evaluations.values()))["prompt"].unique().to_pylist():
            parse(prompt)
    except ValueError as error:
        raise UserError(f"{run_dir} has prompts of another world: {error}") from error
    if not (run_dir / "lora" / WEIGHT_NAME).is_file():
        raise UserError(f"{run_dir} has no lora/{WEIGHT_NAME} yet: it is written when the run ends")
    return change


@command("emoji_world.judge")
def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=path_of, nargs="+")
    parser.add_argument("--picture", type=path_of, help="where to draw the first run's first pairs, before over after")
    args = parser.parse_args(arguments)
    if args.picture and (args.picture.suffix.lower() not in (".png", ".jpg") or not args.picture.parent.is_dir()):
        raise UserError(f"--picture={shown(args.picture)} must be a .png or .jpg in a folder that is there")
    changes = [checked(run_dir) for run_dir in args.runs]
    print(HEAD)
    for index, (run_dir, change) in enumerate(zip(args.runs, changes, strict=True)):
        prompts, before = pictures(run_dir, after=False)
        _, after = pictures(run_dir, after=True)
        print(row(run_dir, change, prompts, before, after), flush=True)
        if args.picture and index == 0:
            draw(run_dir, before, after).save(args.picture)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
