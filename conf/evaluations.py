"""A run's evaluation sets, with what the configuration leaves to the run's own settings filled in."""

import dataclasses
from dataclasses import dataclass

from conf.schema import Config, PromptsConfig, RewardConfig, SamplingConfig

FIRST = "train"  # of every run: its own prompts, rewards and sampling


@dataclass(frozen=True)
class EvaluationSet:
    prompts: PromptsConfig | None  # None: the run's
    count: int
    every: int
    rewards: tuple[str, ...]
    sampling: SamplingConfig
    lora_scale: float = 1.0  # another one: only the last version is evaluated

    def versions(self, batches: int) -> tuple[int, ...]:
        """Version 0, every `every`-th and the last."""
        if self.lora_scale != 1:
            return (batches,)
        return tuple(sorted({*range(0, batches, self.every), batches}))


def sets_of(config: Config) -> dict[str, EvaluationSet]:
    """By name, the first set first."""
    first = config.evaluation
    rewards = tuple(config.rewards if first.rewards is None else first.rewards)
    sets = {FIRST: EvaluationSet(None, first.count, first.every, rewards, config.sampling)}
    for name, own in first.sets.items():
        changed = {key: value for key, value in dataclasses.asdict(own.sampling).items() if value is not None}
        sets[name] = EvaluationSet(
            own.prompts if own.prompts != PromptsConfig() else None,
            first.count if own.count is None else own.count,
            first.every if own.every is None else own.every,
            rewards if own.rewards is None else tuple(own.rewards),
            dataclasses.replace(config.sampling, **changed),
        )
    order = max(1, config.buffer.order_size)  # not checked yet
    half = order * max(1, first.count // 2 // order)  # of the first set's pairs
    for scale in first.scales:
        sets[scale_set(scale)] = EvaluationSet(None, half, first.every, rewards, config.sampling, scale)
    return sets


def scale_set(scale: float) -> str:
    """The name of the set that draws with the LoRA at this scale, such as "scale_25" for a quarter."""
    return f"scale_{100 * scale:.0f}"


def trained_rewards(config: Config) -> tuple[str, ...]:
    """Names of the rewards of which the one is made that is trained on."""
    return tuple(name for name, reward in config.rewards.items() if reward.weight is not None)


def used_rewards(config: Config) -> dict[str, RewardConfig]:
    """Without those that nobody trains on and no set measures: so what an experiment brings can be left out."""
    measured = {name for one in sets_of(config).values() for name in one.rewards}
    return {name: own for name, own in config.rewards.items() if own.weight is not None or name in measured}
