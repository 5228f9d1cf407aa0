"""The learner: takes a batch when it is ready, trains on it, and registers the recovery point it leaves."""

import time
from pathlib import Path

import numpy as np
import ray
import torch

from actors.calls import Clock, call
from buffer.errors import Refused
from buffer.messages import TakenBatch
from buffer.store import write_batch
from conf.schema import Config
from learner.batch import batch_of
from learner.learner import Learner
from policy.policy import Policy

WAIT_S = 5.0


class LearnerActor:
    """Its name says role, index and incarnation."""

    def __init__(self, name: str, config: Config) -> None:
        torch.set_num_threads(config.learner.threads)
        self.name = name
        self.config = config
        self.run_dir = Path(config.run.dir) / config.run.name

    def __repr__(self) -> str:
        return self.name

    def run(self, buffer: ray.actor.ActorHandle) -> None:
        """Works until the driver ends it. Raises UserError when the model or a recovery point cannot be loaded, and
        RunStopped when training cannot go on."""
        clock = Clock()
        with clock.on("loading the model"):
            learner = self._load()
        if call(buffer.current) is None:
            self._register_first(learner, buffer)
        while True:
            with clock.on("waiting for batches"):
                taken: TakenBatch | None = call(buffer.take, self.name, clock.read(), WAIT_S)
            if taken is None:
                continue
            with clock.on("loading weights"):
                if taken.version != learner.version:
                    learner.restore(self.run_dir / call(buffer.current)[1])
            with clock.on("training"):
                trained = learner.train(batch_of(taken.batch, taken.table, tuple(self.config.rewards)))
            with clock.on("saving"):
                self._register(learner, taken, trained.advantages, buffer)

    def _load(self) -> Learner:
        config = self.config
        device = "cuda" if ray.get_gpu_ids() else "cpu"
        checkpointing = config.learner.gradient_checkpointing
        policy = Policy.load(config.model, config.sampling, config.run.seed, device, True, checkpointing)
        return Learner(policy, config)

    def _register_first(self, learner: Learner, buffer: ray.actor.ActorHandle) -> None:
        """Version 0: the base model with the LoRA it starts from."""
        recovery_point = call(buffer.initial_recovery_point)
        learner.save(self.run_dir / recovery_point)
        call(buffer.trained, -1, learner.version, recovery_point, "")

    def _register(
        self, learner: Learner, taken: TakenBatch, advantages: np.ndarray, buffer: ray.actor.ActorHandle
    ) -> None:
        """PROTOCOL.md 10 and 11: recovery point, Parquet file, then the buffer's word on which of them count.

        Where another's count, or none, the next `take` brings a version that is not ours, and it is reloaded.
        """
        learner.save(self.run_dir / taken.recovery_point)
        write_batch(self.run_dir, taken, advantages, now=time.time())
        try:
            counts = call(buffer.trained, taken.batch, learner.version, taken.recovery_point, taken.parquet)
        except Refused:
            return
        if counts is not None and counts != taken.recovery_point:
            learner.restore(self.run_dir / counts)
