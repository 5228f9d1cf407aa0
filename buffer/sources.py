"""Runs that a replay learns from: whether they fit, and the trajectories that they have kept. No torch is needed."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from buffer.run_folder import RunFolder, run_at
from buffer.state import File, work_of
from common.errors import UserError, shown
from conf.evaluations import trained_rewards
from conf.places import by_name
from conf.resume import RunLock
from conf.schema import Config


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


def sources(config: Config) -> list[RunFolder]:
    """The runs in `run.replay`. Raises UserError where one is none, still goes on, is of another model or other
    rewards, or stands there twice."""
    paths = [Path(path) for path in config.run.replay or []]
    own = (Path(config.run.dir) / config.run.name).resolve()
    seen: set[Path] = set()
    for path in paths:
        if path.resolve() == own:
            raise UserError(f"run.name={config.run.name} is one of the runs that are replayed: give the replay another")
        if path.resolve() in seen:
            raise UserError(f"run.replay names {shown(path)} twice, and each trajectory counts once: leave one out")
        seen.add(path.resolve())
    return [_opened(path, config) for path in paths]


def stored(runs: Sequence[RunFolder], config: Config) -> list[Stored]:
    """What was trained on in the runs and is still there. Raises UserError where that is less than a batch."""
    rewards = trained_rewards(config)
    found = [each for place, run in enumerate(runs) for each in _stored(place, run, rewards)]
    if len(found) < config.buffer.batch_size:
        raise UserError(
            f"{', '.join(str(run.path) for run in runs)} have kept the tensors of {len(found)} trajectories, fewer "
            f"than a batch ({config.buffer.batch_size}): a run keeps those of its last buffer.keep_batches batches, so "
            "raise that in a run that is to be replayed"
        )
    return found


def _opened(path: Path, config: Config) -> RunFolder:
    run = run_at(path)
    if RunLock(path.resolve()).is_held():
        raise UserError(f"run.replay names {shown(path)}, which still goes on: wait until it is over")
    theirs = run.config
    there, here = replace(theirs.model, lora=config.model.lora), config.model
    if there != here:
        raise UserError(f"{path} was made with model {there}, and this replay has {here}: replay it by itself")
    for name in trained_rewards(config):
        if name not in trained_rewards(theirs):
            raise UserError(f"{path} has no scores of {name}: it was trained on {', '.join(trained_rewards(theirs))}")
        old, new = (each.rewards[name] for each in (theirs, config))
        if (by_name(old.path), old.args) != (by_name(new.path), new.args):
            raise UserError(
                f"{path} has scores of another reward {name}, {old.path} {old.args} and not {new.path} {new.args}: "
                "replay it by itself"
            )
    return run


def _stored(place: int, run: RunFolder, rewards: Sequence[str]) -> list[Stored]:
    found: list[Stored] = []
    rows_of: dict[str, list[dict[str, object]]] = {}
    columns = ["order_id", "trajectory_id", "prompt", "seed", "set_aside", *rewards]
    for row in run.trajectories(columns).to_pylist():
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
