"""The guard: which version is the best so far, and whether something has gone wrong.

A reward that is optimised for long enough is won by other means than it was made for (Black et al. 2023, section 6.3;
Gao et al. 2022, "Scaling laws for reward model overoptimization"). What nobody trains on then falls: a second reward,
the reward of held-out prompts, the diversity of pictures. The guard looks at these, and decides from nothing but the
history that it is given: the same history, the same verdict.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from conf.evaluations import FIRST, sets_of, trained_rewards
from conf.schema import Config, GuardAction, GuardConfig


@dataclass(frozen=True)
class Measured:
    """A measure at a version."""

    mean: float
    std: float  # over pictures or prompts


@dataclass(frozen=True)
class Seen:
    """What is known of an evaluated version."""

    version: int
    measures: Mapping[str, Measured]  # by "<set>/<measure>"
    kl: float | None = None  # to the base model, in nats a trajectory; None where it is not known


@dataclass(frozen=True)
class Verdict:
    best: int  # the version with the highest mean of `best_by` among those that are within all limits
    wrong: Mapping[int, Sequence[str]]  # by version, what went wrong there, in words
    unknown: Sequence[str]  # measures that are watched, and that evaluations of their set do not have

    @property
    def sentences(self) -> list[str]:
        """The first that went wrong first."""
        found = [f"guard: at version {version} {what}" for version, all_ in self.wrong.items() for what in all_]
        return found + [f"guard: {name} is watched, and no evaluation has measured it" for name in self.unknown]


def best_by(config: Config) -> str:
    """The measure that names the best version."""
    trained = {*trained_rewards(config)}
    sets = {name: one for name, one in sets_of(config).items() if name != FIRST and one.lora_scale == 1}
    further = [name for name, one in sets.items() if trained <= {*one.rewards}]
    return config.guard.best_by or f"{min(further, key=lambda name: sets[name].every, default=FIRST)}/reward"


def judge(history: Sequence[Seen], config: GuardConfig, best_by: str) -> Verdict:
    """history: by ascending version; the first is what the others are compared with.

    A version that lacks a measure is not judged by it. Before anything is known the best is version 0.
    """
    wrong: dict[int, list[str]] = {}
    best, highest, since_best = 0, -float("inf"), 0
    for place, seen in enumerate(history):
        found = _beyond_limits(history[:place], seen, config)
        if (now := seen.measures.get(best_by)) is not None:
            better = now.mean > highest and not found
            best, highest = (seen.version, now.mean) if better else (best, highest)
            since_best = 0 if better else since_best + 1
            if config.patience is not None and since_best >= config.patience:
                times = "evaluation" if since_best == 1 else "evaluations"
                found.append(f"{best_by} has not been better than at version {best} for {since_best} {times}")
        if found:
            wrong[seen.version] = found
    known = {name for seen in history for name in seen.measures}
    evaluated = {name.split("/")[0] for name in known}
    watched = dict.fromkeys((best_by, *config.max_fall))
    unknown = [name for name in watched if name not in known and name.split("/")[0] in evaluated]
    if config.max_kl is not None and len(history) > 1 and all(seen.kl is None for seen in history):
        unknown.append("kl/base")
    return Verdict(best, wrong, unknown)


def _beyond_limits(before: Sequence[Seen], now: Seen, config: GuardConfig) -> list[str]:
    found = []
    for name, limit in config.max_fall.items():
        earlier = [seen.measures[name] for seen in before if name in seen.measures]
        if name not in now.measures or not earlier:
            continue
        fall, unit = max(each.mean for each in earlier) - now.measures[name].mean, earlier[0].std
        if fall > limit * unit:
            size = f"{fall / unit:.2f} standard deviations" if unit > 0 else f"{fall:.3g}, where it did not vary"
            found.append(f"{name} has fallen by {size} (guard.max_fall: {limit:g})")
    if config.max_kl is not None and now.kl is not None and now.kl > config.max_kl:
        found.append(f"the KL to the base model is {now.kl:.4g} nats a trajectory (guard.max_kl: {config.max_kl:g})")
    return found


def halvings(verdict: Verdict, config: GuardConfig) -> int:
    """How often the learning rate has been halved: once for each version at which something went wrong."""
    return len(verdict.wrong) if config.action is GuardAction.slow else 0


def stops(verdict: Verdict, config: GuardConfig) -> str:
    """Why the run ends; "" as long as it goes on."""
    return verdict.sentences[0] if verdict.wrong and config.action is GuardAction.stop else ""
