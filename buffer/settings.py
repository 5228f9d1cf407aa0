"""What a run's settings mean for its buffer, in one place: the plan, the rules, and how its rewards become one."""

from collections.abc import Sequence

from buffer.orders import FixedSet, Plan, Sizes
from buffer.rows import Combination
from buffer.rules import Rules, SetRules
from conf.evaluations import sets_of, trained_rewards
from conf.prompts import resolve_prompts
from conf.schema import Combine, Config


def plan_of(config: Config, prompts: Sequence[str]) -> Plan:
    """prompts: the run's; those of evaluation sets are read here. Raises UserError."""
    sets = [
        FixedSet(name, one.count, tuple(resolve_prompts(one.prompts, f"evaluation.sets.{name}.prompts")))
        if one.prompts
        else FixedSet(name, one.count, tuple(prompts))
        for name, one in sets_of(config).items()
    ]
    sizes = config.buffer
    return Plan(
        seed=config.run.seed,
        prompts=tuple(prompts),
        batch_size=sizes.batch_size,
        order_size=sizes.order_size,
        sets=tuple(sets),
        group_size=sizes.group_size,
        same_noise=config.sampling.same_noise,
    )


def sizes_of(config: Config) -> Sizes:
    counts = tuple((name, one.count) for name, one in sets_of(config).items())
    return Sizes(config.buffer.batch_size, config.buffer.order_size, counts)


def rules_of(config: Config) -> Rules:
    return Rules(
        sizes=sizes_of(config),
        rewards=trained_rewards(config),
        batches=config.run.batches,
        max_staleness=config.buffer.max_staleness,
        keep_batches=config.buffer.keep_batches,
        keep_checkpoints=config.checkpoints.keep,
        claim_timeout_s=config.buffer.claim_timeout_s,
        lease_timeouts={name: reward.timeout_s for name, reward in config.rewards.items()},
        train_timeout_s=config.learner.timeout_s,
        max_failed_share=config.buffer.max_failed_share,
        sets={name: SetRules(one.versions(config.run.batches), one.rewards) for name, one in sets_of(config).items()},
    )


def combination_of(config: Config) -> Combination:
    trained = {name: config.rewards[name] for name in trained_rewards(config)}
    weights = {name: reward.weight for name, reward in trained.items() if reward.weight is not None}
    if config.combine is Combine.sum:
        return Combination(weights)
    return Combination(weights, {name: reward.range for name, reward in trained.items() if reward.range})
