"""The learner: a policy, its objective and optimizer, its advantages, and the version they have reached."""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from buffer.orders import Version
from common.errors import UserError
from conf.places import by_name
from conf.schema import Config
from conf.settings import flatten, may_change
from learner import recovery
from learner.advantages import furthest
from learner.batch import Batch
from learner.kl_target import steered
from learner.metrics import finite, reward_metrics, update_metrics
from learner.optimizer_state import load_optimizer_state, optimizer_state
from learner.ranks import Ranks
from learner.registry import make_advantage, make_objective
from learner.update import BaseKL, Updater
from policy import lora
from policy.policy import Policy

OWN = ("model.", "sampling.", "learner.")  # settings that a recovery point is of


@dataclass(frozen=True)
class TrainedBatch:
    metrics: dict[str, float]  # docs/algorithm.md has their meaning; all finite
    advantages: np.ndarray  # float32 [n], as trained on (clipped), in the order of the batch's rows


class Learner:
    """Trains batches 0, 1, 2, ... in that order. Same settings, same batches, same threads: the same bits, whether or
    not `save` and `restore` come in between."""

    def __init__(self, policy: Policy, config: Config, ranks: Ranks | None = None) -> None:
        """policy: loaded with trainable=True. ranks: those that train together; each has a Learner of its own, given
        the same batches."""
        self.policy = policy
        self.config = config
        self.objective = make_objective(config)
        self.advantage = make_advantage(config)
        self.updater = Updater(policy, self.objective, config.learner, ranks)
        self.optimizer_steps = 0  # taken since version 0
        self.lr_halvings = 0  # by the guard
        self.metrics: dict[str, float] = {}  # of the batch trained last
        self.sampling: dict[str, Tensor] | None = None  # the LoRA that samplers have, where it is not the trained one
        self.version = Version(0, lora.digest(policy.lora_state()))

    @classmethod
    def load(cls, config: Config, device: str, ranks: Ranks | None = None) -> "Learner":
        """With the policy that the settings name. Raises UserError when its model cannot be loaded."""
        checkpointing = config.learner.gradient_checkpointing
        policy = Policy.load(config.model, config.sampling, config.run.seed, device, True, checkpointing)
        return cls(policy, config, ranks)

    def train(self, batch: Batch, lr_halvings: int = 0) -> TrainedBatch:
        """Trains on the next batch; afterwards `version` is one higher. lr_halvings: how often the learning rate is to
        have been halved by now; never undone.

        Raises ValueError if another batch is next, RunStopped as `Updater.train` does.
        """
        if batch.number != self.version.number or not len(batch):
            raise ValueError(
                f"version {self.version.number} cannot train batch {batch.number} of {len(batch)} trajectories"
            )
        halvings = self.updater.halvings
        clip = self.config.learner.advantage_clip
        advantages = np.clip(self._advantages(batch), -clip, clip)
        base = self.updater.kl_to_base(batch, self.sampling)
        self.lr_halvings = max(self.lr_halvings, lr_halvings)
        lr = self.updater.optimizer.param_groups[0]["lr"] = self.config.learner.lr * 0.5**self.lr_halvings
        sampled_by = self.published
        rows = furthest(advantages, self.config.learner.trained_of(len(batch)))
        trained_on = batch.take(rows) if len(rows) < len(batch) else batch
        steps = self.updater.train(trained_on, advantages[rows], self.sampling)
        self.optimizer_steps += sum(step.taken for step in steps)
        self.sampling = self._followed(sampled_by, self.objective.following(batch.number))
        self.version = Version(batch.number + 1, lora.digest(self.published))
        metrics = {
            **reward_metrics(batch, self.config.buffer.batch_size, self.advantage.stds()),
            **finite(self.objective.metrics(trained_on, steps)),
            **update_metrics(steps, base),
            "lr": lr,
            "optimizer_steps": float(self.optimizer_steps),
            "microbatch": float(self.updater.microbatch),
            "microbatch_halvings": float(self.updater.halvings - halvings),
        }
        if self.objective.kl_weight:
            metrics["kl/weight"] = self.objective.kl_weight
        self._steer(base)
        self.metrics = metrics
        return TrainedBatch(metrics, advantages)

    @property
    def published(self) -> dict[str, Tensor]:
        """The LoRA of `version`: what samplers and evaluations have, and what is handed out."""
        return self.policy.lora_state() if self.sampling is None else self.sampling

    def _followed(self, old: Mapping[str, Tensor], stays: float) -> dict[str, Tensor] | None:
        """old <- stays old + (1 - stays) trained; None: the trained LoRA itself."""
        if not stays:
            return None
        return {name: torch.lerp(trained, old[name], stays) for name, trained in self.policy.lora_state().items()}

    def _steer(self, base: BaseKL | None) -> None:
        """The weight of the KL penalty for the next batch; `metrics` are still those of the batch before."""
        if (target := self.config.learner.kl_target) is not None and base is not None:
            before = self.metrics.get("kl/base_per_dimension", base.dimension)
            if math.isfinite(before + base.dimension):  # half precision may overflow in one batch
                self.objective.kl_weight = steered(self.objective.kl_weight, base.dimension, before, target)

    def _advantages(self, batch: Batch) -> np.ndarray:
        """Raises UserError if they are not one finite number a picture: the class may be a user's own."""
        advantages = np.asarray(self.advantage(batch.prompts, batch.rewards, batch.groups), np.float32)
        if advantages.shape != (len(batch),) or not np.isfinite(advantages).all():
            bad = advantages[~np.isfinite(advantages)][:1].tolist() or f"shape {list(advantages.shape)}"
            raise UserError(
                f"learner.advantage={self.config.learner.advantage} gave {bad} for the {len(batch)} pictures of batch "
                f"{batch.number}; let it give one finite number a picture."
            )
        return advantages

    def _state_of_advantage(self) -> dict[str, Any]:
        """Raises UserError unless it comes back from a file as it is: the class may be a user's own."""
        state = self.advantage.state_dict()
        try:
            plain = json.loads(json.dumps(state, allow_nan=False)) == state
        except (TypeError, ValueError):
            plain = False
        if not plain:
            raise UserError(
                f"learner.advantage={self.config.learner.advantage} has a state_dict that JSON does not give back as "
                "it is; let it hold texts, lists and Python's numbers under texts."
            )
        return state

    def save(self, folder: Path) -> None:
        """Writes the recovery point of `version` into `folder`, which must not exist. See learner/recovery.py.

        Raises UserError if the advantage's state is no plain JSON.
        """
        point = recovery.RecoveryPoint(
            version=self.version,
            lora=self.published,
            trained=None if self.sampling is None else self.policy.lora_state(),
            optimizer=optimizer_state(self.updater.optimizer, self.updater.parameters),
            advantage=self._state_of_advantage(),
            counters={
                "optimizer_steps": self.optimizer_steps,
                "non_finite_in_a_row": self.updater.non_finite_in_a_row,
                "lr_halvings": self.lr_halvings,
            },
            kl_weight=self.objective.kl_weight,
            settings=self._settings(),
            metrics=self.metrics,
        )
        recovery.write(folder, point, self.policy)

    def restore(self, folder: Path, version: Version) -> None:
        """Goes on from the recovery point of `version` in `folder`.

        Raises UserError if a file of it is missing, damaged or another version's, or if it is of other settings than
        this learner's.
        """
        point = recovery.read(folder, version)
        ours = self._settings()
        for name, value in point.settings.items():
            if ours.get(name) != by_name(value):
                raise UserError(
                    f"The recovery point {folder} was written with {name}={value}, but this run has {ours.get(name)}; "
                    "set it back, or start a new run under another run.name."
                )
        self.policy.load_lora_state(point.lora if point.trained is None else point.trained)
        self.sampling = None if point.trained is None else point.lora
        load_optimizer_state(self.updater.optimizer, self.updater.parameters, point.optimizer)
        self.advantage.load_state_dict(point.advantage)
        self.optimizer_steps = point.counters["optimizer_steps"]
        self.updater.non_finite_in_a_row = point.counters["non_finite_in_a_row"]
        self.lr_halvings = point.counters["lr_halvings"]
        self.objective.kl_weight = point.kl_weight
        self.metrics = point.metrics
        self.version = point.version

    def _settings(self) -> dict[str, Any]:
        """Without which the weights mean something else, or the next batch would not continue this run: plain JSON."""
        own = {
            key: by_name(value)
            for key, value in flatten(dataclasses.asdict(self.config)).items()
            if key == "run.seed" or (key.startswith(OWN) and not may_change(key))
        }
        plain: dict[str, Any] = json.loads(json.dumps(own))
        return plain
