"""A run's evaluation made again: of any version that it evaluated, with its LoRA at any scale, without Ray."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa
import torch

from buffer.orders import Evaluation
from buffer.rows import Combination
from buffer.run_folder import RunFolder
from buffer.settings import combination_of, plan_of
from common.errors import UserError
from common.precision import exact_float32
from conf.evaluations import sets_of
from conf.prompts import saved_prompts
from policy.policy import Policy
from policy.rollout import NonFinite, rollout
from rewards.base import NamedReward, score_order
from rewards.registry import resolve


class Again:
    """Use `at` for one version and scale after another; models are loaded once.

    pictures: uint8 [n, H, W, 3] of the last call, in the order of its rows.
    """

    def __init__(self, run: RunFolder, set_name: str) -> None:
        """Raises UserError if the run has no such set, or its model or a reward cannot be loaded."""
        sets = sets_of(run.config)
        if set_name not in sets:
            raise UserError(f"{run.path} has no evaluation set {set_name}: there are {', '.join(sets)}")
        one, config = sets[set_name], run.config
        self.run, self.sampling = run, one.sampling
        plan = plan_of(config, saved_prompts(run.path))
        theirs, ours = run.plan.get("sets", {}).get(set_name), plan.identity()["sets"][set_name]
        if theirs != ours:
            raise UserError(
                f"{run.path} was evaluated on {theirs} in its set {set_name}, and its settings now name {ours}: put "
                "the file of prompts back as it was"
            )
        exact_float32()
        self.orders = plan.evaluation(Evaluation(0, set_name))
        self.rewards = [resolve(name, config.rewards[name].path, config.rewards[name].args) for name in one.rewards]
        self.combination = combination_of(config)
        device = "cuda" if torch.cuda.is_available() and config.samplers.num_gpus else "cpu"
        model = replace(config.model, lora=replace(config.model.lora, init_from=None))  # each version's LoRA has all
        self.policy = Policy.load(model, one.sampling, config.run.seed, device, trainable=False)
        self.pictures = np.empty((0, *self.policy.image_size, 3), np.uint8)

    def at(self, version: int, scale: float = 1.0) -> pa.Table:
        """Rows of the set's pairs as the run would have them: prompt, seed, rewards. scale: of the LoRA; at 0 it is the
        pretrained model. Raises UserError if that version's LoRA was not kept."""
        if version not in self.run.loras:
            there = ", ".join(map(str, self.run.loras))
            raise UserError(f"{self.run.path} has kept no LoRA of version {version}: there are {there}")
        folder = self.run.loras[version]
        self.policy.load_lora(folder, f"The run's LoRA {folder}")
        policy = self.policy.with_sampling(self.sampling, scale)
        torch.set_num_threads(self.run.config.samplers.threads)  # last bits depend on it
        try:
            made = [rollout(policy, order.prompts, order.seeds).images for order in self.orders]
        except NonFinite as error:
            raise UserError(f"at scale {scale:g} {error}") from error
        self.pictures = np.concatenate(made)
        tables = [
            _scored(images, order.prompts, order.seeds, self.rewards, self.combination, self.run)
            for images, order in zip(made, self.orders, strict=True)
        ]
        return pa.concat_tables(tables, promote_options="permissive")


def _scored(
    images: np.ndarray,
    prompts: Sequence[str],
    seeds: Sequence[int],
    rewards: Sequence[NamedReward],
    combination: Combination,
    run: RunFolder,
) -> pa.Table:
    """An order's rows. A picture that cannot be scored has no reward, as in the run."""
    columns: dict[str, pa.Array] = {"prompt": pa.array(prompts), "seed": pa.array(seeds, pa.int64())}
    values: dict[str, np.ndarray] = {}
    for reward in rewards:
        torch.set_num_threads(run.config.rewards[reward.name].threads)
        scores, failed = score_order(reward, images, prompts, run.config.rewards[reward.name].batch_size)
        scored = [row for row in range(len(prompts)) if row not in failed]
        values[reward.name] = np.full(len(prompts), np.nan, np.float32)
        values[reward.name][scored] = scores.scores
        columns[reward.name] = pa.array(values[reward.name], from_pandas=True)
        for name, cells in scores.columns.items():
            placed = dict(zip(scored, cells, strict=True))
            columns[f"{reward.name}.{name}"] = pa.array([placed.get(row) for row in range(len(prompts))])
    if combination.weights.keys() <= values.keys():
        columns["reward"] = pa.array(combination(values).astype(np.float32), from_pandas=True)
    else:
        columns["reward"] = pa.nulls(len(prompts), pa.float32())
    return pa.table(columns)


def kept_or_last(run: RunFolder) -> int:
    """The version in lora_best/, else the last evaluated one: version 0 has nothing to be scaled. Raises UserError for
    a run that has kept none."""
    if not run.loras:
        raise UserError(f"{run.path} has kept no LoRA: is it a run of ddpo-ray 0.6 or later, and begun?")
    return run.best if run.best in run.loras and run.best else max(run.loras)
