"""What must hold between settings, and between settings and the cluster, before anything starts.

Each check is one sentence for a user: the setting with its value, and the fix.
"""

import copy
import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any

from common.errors import UserError, quoted, shown
from conf.evaluations import FIRST, scale_set, sets_of, trained_rewards
from conf.names import check_different
from conf.places import check_room_for_sockets
from conf.prompts import resolve_prompts
from conf.schema import Combine, Config, DType
from conf.settings import flatten, setting_of

JUDGE = "emoji_world.judged:Judged"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")


def validate(config: Config) -> None:
    """Raises UserError at the first thing that cannot be. Reads no file but that of the prompts."""
    check_ranges(config)
    _check_names(config)
    _check_sizes(config)
    _check_learner(config)
    _check_rewards(config)
    _check_guard(config)
    _check_replay(config)
    _check_types(config)
    check_room_for_sockets(config)
    resolve_prompts(config.prompts)
    for name, one in sets_of(config).items():
        if one.prompts is not None:
            resolve_prompts(one.prompts, f"evaluation.sets.{name}.prompts")


def cluster_fits(config: Config, resources: dict[str, float]) -> None:
    """Raises UserError if not even one actor of each role, with all ranks of the learner, fits at once on a cluster
    with these resources in all."""
    roles = {"a sampler": (config.samplers, 1), "the learner": (config.learner, config.learner.count)}
    roles |= {f"reward {name}": (reward, 1) for name, reward in config.rewards.items()}
    for unit, resource in (("num_cpus", "CPU"), ("num_gpus", "GPU")):
        needs = {role: count * float(getattr(worker, unit)) for role, (worker, count) in roles.items()}
        has, needed = resources.get(resource, 0.0), math.fsum(needs.values())
        if needed > has + 1e-6:
            parts = ", ".join(f"{role} {need:g}" for role, need in needs.items() if need)
            raise UserError(
                f"the cluster has {has:g} {resource}s, but one actor of each role needs {needed:g} ({parts}): "
                f"lower their {unit} or use a larger cluster"
            )


def effective_gpus(config: Config, resources: dict[str, float]) -> tuple[Config, list[str]]:
    """The settings with every num_gpus at 0 where the cluster has no GPU, and a sentence that says so."""
    wanted = {key: value for key, value in flatten(dataclasses.asdict(config)).items() if key.endswith(".num_gpus")}
    asking = [f"{key}={value:g}" for key, value in wanted.items() if value]
    if resources.get("GPU", 0) > 0 or not asking:
        return config, []
    without = copy.deepcopy(config)
    without.samplers.num_gpus = without.learner.num_gpus = 0.0
    for reward in without.rewards.values():
        reward.num_gpus = 0.0
    return without, [f"no GPU in this cluster: {', '.join(asking)} taken as 0, everything runs on CPUs"]


def check_ranges(config: Config) -> None:
    """Raises UserError for a number that no run could have."""
    for key, value in flatten(dataclasses.asdict(config)).items():
        if not all(math.isfinite(number) for number in _numbers(value)):
            raise UserError(f"{key}={shown(value)} must be finite")
        setting = setting_of(key)
        if setting and not setting.range.holds(value):
            raise UserError(f"{key}={value} {setting.range.sentence}")
    if not all(0 < beta < 1 for beta in config.learner.betas):
        raise UserError(f"learner.betas={list(config.learner.betas)} must lie between 0 and 1, such as [0.9, 0.999]")


def _numbers(value: Any) -> Iterator[float]:
    """Every float in a value, however deep."""
    if isinstance(value, float):
        yield value
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _numbers(entry)
    elif isinstance(value, dict):
        yield from _numbers(list(value.values()))


def _check_names(config: Config) -> None:
    if not NAME.fullmatch(config.run.name):
        raise UserError(
            f"run.name={quoted(config.run.name)} must be a folder's name of letters, digits, '_', '-' and '.', "
            "beginning with a letter or digit; where the folder lies is run.dir"
        )
    check_different("rewards", config.rewards)
    check_different("evaluation.sets", [FIRST, *config.evaluation.sets])
    for scale in config.evaluation.scales:
        if not 0.01 <= scale <= 0.99 or abs(100 * scale - round(100 * scale)) > 1e-9:
            raise UserError(f"evaluation.scales holds {scale:g}: give hundredths between 0 and 1, such as [0.25,0.5]")
    scales = [scale_set(scale) for scale in config.evaluation.scales]
    if len({*scales}) < len(scales) or {*scales} & {name.lower() for name in config.evaluation.sets}:
        raise UserError(f"evaluation.scales makes the sets {', '.join(scales)}: give each scale once, and rename yours")
    if FIRST in config.evaluation.sets:
        raise UserError(f"evaluation.sets.{FIRST}: evaluation.count and evaluation.every are that set's, rename yours")
    if not config.model.lora.targets:
        raise UserError("model.lora.targets is empty: name the layers to train, such as [to_q, to_k, to_v, to_out.0]")


def _check_sizes(config: Config) -> None:
    size, order = config.buffer.batch_size, config.buffer.order_size
    evaluation = config.evaluation
    if size % order:
        raise UserError(
            f"buffer.batch_size={size} is not divisible by buffer.order_size={order}: "
            f"take {_nearest_multiple(size, order)} or another order_size"
        )
    if size // order < 4:
        raise UserError(
            f"buffer.batch_size={size} makes {size // order} orders of buffer.order_size={order}, and a batch has at "
            f"least four: take an order_size of at most {size // 4} or a larger batch"
            if size >= 4
            else f"buffer.batch_size={size} is too small: a batch has at least four orders, so take 4 or more"
        )
    _check_groups(config)
    for name, one in sets_of(config).items():
        if one.count % order:
            key = "evaluation.count" if name == FIRST else f"evaluation.sets.{name}.count"
            raise UserError(
                f"{key}={one.count} is not divisible by buffer.order_size={order}: "
                f"take {_nearest_multiple(one.count, order)}"
            )
    if evaluation.grid > evaluation.count:
        raise UserError(
            f"evaluation.grid={evaluation.grid} is more than evaluation.count={evaluation.count}: lower evaluation.grid"
        )


def _check_groups(config: Config) -> None:
    size, group = config.buffer.batch_size, config.buffer.group_size
    if size % group:
        raise UserError(
            f"buffer.batch_size={size} is not divisible by buffer.group_size={group}: "
            f"take {_nearest_multiple(size, group)} or another group_size"
        )
    if config.sampling.same_noise and group == 1 and not config.run.replay:
        raise UserError("sampling.same_noise=true with buffer.group_size=1 has no groups: set it, such as to 4")
    if config.sampling.same_noise and not config.sampling.eta:
        raise UserError(
            "sampling.same_noise=true with sampling.eta=0 makes all pictures of a group the same: leave one"
        )


def _check_learner(config: Config) -> None:
    share, steps = config.learner.train_share, config.learner.optimizer_steps
    size = config.learner.trained_of(config.buffer.batch_size)
    trained = f"buffer.batch_size={config.buffer.batch_size}" + (
        f", learner.train_share={share:g}" if share < 1 else ""
    )
    if steps > size:
        raise UserError(
            f"learner.optimizer_steps={steps} is more than the {size} trajectories that are trained on ({trained}), "
            "and each step needs one: lower it"
        )
    if config.learner.count > size // steps:
        raise UserError(
            f"learner.count={config.learner.count} is more than the {size // steps} trajectories of an optimizer step "
            f"({trained}, by learner.optimizer_steps={steps}): lower it"
        )
    if config.learner.count > 1 and 0 < config.learner.num_gpus < 1:
        raise UserError(
            f"learner.num_gpus={config.learner.num_gpus} with learner.count={config.learner.count} would put ranks "
            "together on one GPU, which NCCL refuses: give each a whole one, or set learner.count=1"
        )
    if config.learner.train_steps is not None and config.learner.train_steps > config.sampling.steps:
        raise UserError(
            f"learner.train_steps={config.learner.train_steps} is more than sampling.steps={config.sampling.steps}: "
            "lower it, or leave it out to train on all"
        )
    if config.learner.kl_target is not None and not config.learner.kl_weight:
        raise UserError(
            f"learner.kl_target={config.learner.kl_target:g} with learner.kl_weight=0 has no weight to steer: give it "
            "one to start from, such as learner.kl_weight=1"
        )
    if config.learner.kl_target is not None and not config.sampling.eta:
        raise UserError(
            f"learner.kl_target={config.learner.kl_target:g} with sampling.eta=0: without noise in its steps a path "
            "has no KL to steer by, so set learner.kl_target=null"
        )
    if config.learner.tracker_min_count > config.learner.tracker_size:
        raise UserError(
            f"learner.tracker_min_count={config.learner.tracker_min_count} is never reached with "
            f"learner.tracker_size={config.learner.tracker_size}: lower it"
        )


def _check_rewards(config: Config) -> None:
    if not config.rewards:
        raise UserError("no reward is set: add one, such as rewards.compressibility.path=compressibility")
    if not any(reward.weight for reward in config.rewards.values()):
        names = ", ".join(f"rewards.{name}.weight" for name in config.rewards)
        raise UserError(f"nothing to train on with {names} at 0 or null: raise one")
    sets = sets_of(config)
    for name, one in sets.items():
        if not one.rewards or len({*one.rewards}) < len(one.rewards) or not {*one.rewards} <= {*config.rewards}:
            key = "evaluation.rewards" if name == FIRST else f"evaluation.sets.{name}.rewards"
            raise UserError(
                f"{key}={shown(list(one.rewards))} must be names of rewards, each once: "
                f"there are {', '.join(config.rewards)}"
            )
    for name, reward in config.rewards.items():
        if reward.weight is None:
            continue
        if reward.path == JUDGE:
            raise UserError(
                f"rewards.{name}.weight={reward.weight:g} would train on Emoji World's judge, and then nobody "
                f"could say whether pictures got better: set rewards.{name}.weight=null"
            )
        if config.combine is Combine.product and reward.range is None:
            raise UserError(
                f"combine=product needs rewards.{name}.range, the scores that count as 0 and 1, such as [0.0, 1.0]"
            )
        if reward.range is not None and not reward.range[0] < reward.range[1]:
            raise UserError(
                f"rewards.{name}.range={list(reward.range)} must be two numbers, the smaller one first: swap or widen "
                "them"
            )
        if config.combine is Combine.product and reward.weight < 0:
            raise UserError(f"rewards.{name}.weight={reward.weight} is an exponent in a product: give 0 or more")


def _check_replay(config: Config) -> None:
    asked = [("run.mirror", config.run.mirror, "null"), ("learner.count", config.learner.count, "1")]
    asked += [
        (f"buffer.{key}", getattr(config.buffer, key), fit)
        for key, fit in (("max_staleness", "0"), ("group_size", "1"))
    ]
    for key, value, fit in asked:
        if config.run.replay and str("null" if value is None else value) != fit:
            raise UserError(f"{key}={value} with a replay, which works in one process and in order: leave it at {fit}")


def _check_guard(config: Config) -> None:
    trained = {*trained_rewards(config)}
    sets = {name: one for name, one in sets_of(config).items() if one.lora_scale == 1}  # the others see one version
    if missing := sorted(trained - {*sets[FIRST].rewards}):
        raise UserError(
            f"evaluation.rewards leaves out {', '.join(missing)}, which is trained on: add it, or leave it out of the "
            f"run with rewards.{missing[0]}.weight=null"
        )
    named = [("guard.best_by", config.guard.best_by), *(("guard.max_fall", name) for name in config.guard.max_fall)]
    for key, name in named:
        if name is None:
            continue
        of_set, _, measure = name.partition("/")
        measured = sets[of_set].rewards if of_set in sets else ()
        known = {*measured, "diversity"} | ({"reward"} if trained <= {*measured} else set())
        if measure.split(".")[0] not in known or not measured:
            raise UserError(
                f"{key} names {quoted(name)}, which no evaluation measures: write <set>/<measure>, with a set of "
                f"{', '.join(sets)}, and reward, diversity, or one of its rewards ({', '.join(sets[FIRST].rewards)})"
            )
    for name, limit in config.guard.max_fall.items():
        if not isinstance(limit, float | int) or not limit > 0:
            raise UserError(f"guard.max_fall of {name} is {shown(limit)}: give a number above 0, such as 1.0")


def _check_types(config: Config) -> None:
    if config.model.dtype is DType.float64:
        raise UserError(
            "model.dtype=float64 is only for checking numerics: a run stores log-probs and LoRA weights in float32, so "
            "take that"
        )
    stored = config.sampling.latents_dtype
    if stored not in (DType.float32, DType.float16):
        raise UserError(
            f"sampling.latents_dtype={stored.value} cannot be stored: take float32, or float16 for half the space"
        )


def _nearest_multiple(value: int, of: int) -> int:
    return max(of, round(value / of) * of)
