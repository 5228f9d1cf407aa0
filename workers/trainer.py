"""The trainer: takes a batch when it is ready, trains on it, and registers the recovery point it leaves.

It may be one of several ranks, which share every batch (docs/buffer.md, rule 13). All of them take it, under the
group's name; rank 0 alone writes files and registers the batch.
"""

import time
from pathlib import Path

import numpy as np

from buffer.protocol import Buffer, Refused, TakenBatch
from buffer.store import write_batch
from common.clock import Clock
from learner.batch import batch_of
from learner.learner import Learner


class Trainer:
    """Call `begin` once, and `step` again and again."""

    def __init__(self, group: str, learner: Learner, buffer: Buffer, run_dir: Path, clock: Clock) -> None:
        self.group = group
        self.learner = learner
        self.ranks = learner.updater.ranks
        self.buffer = buffer
        self.run_dir = run_dir
        self.clock = clock

    def begin(self) -> None:
        """Encodes the run's prompts. Registers version 0, the base model with the LoRA it starts from, unless that was
        done by an earlier one."""
        self.learner.policy.prompts.fill(self.buffer.prompts())
        if self.ranks.first and self.buffer.current() is None:
            recovery_point = self.buffer.initial_recovery_point()
            self.learner.save(self.run_dir / recovery_point)
            self.buffer.trained(-1, self.learner.version, recovery_point, "")

    def step(self) -> bool:
        """Whether there was a batch. Raises UserError when a recovery point cannot be loaded, and RunStopped when
        training cannot go on."""
        taken = self.buffer.take(self.group)
        if taken is None:
            return False
        learner, ranks = self.learner, self.ranks
        with self.clock.on("loading weights"):
            if taken.version != learner.version:
                self._restore()
        with self.clock.on("waiting for other ranks"):
            ranks.agree("weights and batches", f"{learner.version.digest} {taken.roster}")
            lr_halvings = ranks.highest(taken.lr_halvings)  # they may have taken it before and after a change
        with self.clock.on("training"):
            config = learner.config
            batch = batch_of(taken.batch, taken.table, tuple(config.rewards), config.buffer.group_size)
            trained = learner.train(batch, lr_halvings)
        with self.clock.on("saving"):
            another = ranks.first and self._register(taken, trained.advantages)
        with self.clock.on("waiting for other ranks"):
            another = ranks.any(another)
        if another:
            self._restore()
        return True

    def _restore(self) -> None:
        current = self.buffer.current()
        assert current is not None, "a batch was taken, so version 0 is registered"
        version, recovery_point = current
        self.learner.restore(self.run_dir / recovery_point, version)

    def _register(self, taken: TakenBatch, advantages: np.ndarray) -> bool:
        """Rules 10 and 11: recovery point, Parquet file, then the buffer's word on which of them count.

        Whether another's count: then it is reloaded. Where nobody's do, the next `take` brings a version that is not
        ours, and that is reloaded.
        """
        self.learner.save(self.run_dir / taken.recovery_point)
        write_batch(self.run_dir, taken, advantages, now=time.time())
        try:
            counts = self.buffer.trained(taken.batch, self.learner.version, taken.recovery_point, taken.parquet)
        except Refused:
            return False
        return counts is not None and counts != taken.recovery_point
