"""What a run's settings mean for its buffer, in one place: the plan, the rules, and how its rewards become one."""

from collections.abc import Sequence

from buffer.orders import Plan, Sizes
from buffer.rows import Combination
from buffer.rules import Rules
from conf.schema import Combine, Config


def plan_of(config: Config, prompts: Sequence[str]) -> Plan:
    sizes = config.buffer
    return Plan(config.run.seed, tuple(prompts), sizes.batch_size, sizes.order_size, config.evaluation.count)


def rules_of(config: Config) -> Rules:
    return Rules(
        sizes=Sizes(config.buffer.batch_size, config.buffer.order_size, config.evaluation.count),
        rewards=tuple(config.rewards),
        batches=config.run.batches,
        max_staleness=config.buffer.max_staleness,
        keep_batches=config.buffer.keep_batches,
        keep_checkpoints=config.checkpoints.keep,
        claim_timeout_s=config.buffer.claim_timeout_s,
        lease_timeouts={name: reward.timeout_s for name, reward in config.rewards.items()},
        train_timeout_s=config.learner.timeout_s,
        max_failed_share=config.buffer.max_failed_share,
        evaluate_versions=evaluated_versions(config),
    )


def evaluated_versions(config: Config) -> tuple[int, ...]:
    """Version 0, every `evaluation.every`-th and the last."""
    return tuple(sorted({*range(0, config.run.batches, config.evaluation.every), config.run.batches}))


def combination_of(config: Config) -> Combination:
    weights = {name: reward.weight for name, reward in config.rewards.items()}
    if config.combine is Combine.sum:
        return Combination(weights)
    return Combination(weights, {name: reward.range for name, reward in config.rewards.items() if reward.range})
