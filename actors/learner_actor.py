"""The learner: takes a batch when it is ready, trains on it, and registers the recovery point it leaves.

It is a group of ranks, one actor each, that share every batch (PROTOCOL.md 13). All of them take it, under the group's
name; rank 0 alone writes files and registers the batch. Where one dies the others' sums never come, and the fleet ends
the whole group and starts another, which goes on from the recovery point.
"""

import socket
import time
from pathlib import Path

import numpy as np
import ray
import torch

from actors.calls import Clock, ask, call
from actors.devices import hide_unreserved_gpus
from actors.ending import judged
from buffer.errors import Refused
from buffer.messages import TakenBatch
from buffer.store import write_batch
from conf.errors import UserError
from conf.schema import Config
from learner.batch import batch_of
from learner.learner import Learner
from learner.ranks import Meeting, Ranks
from policy.policy import Policy


class LearnerActor:
    """One rank. Its name says role, rank and incarnation; the group goes by that of rank 0."""

    def __init__(
        self, name: str, group: str, rank: int, config: Config, meeting_point: tuple[str, int] | None = None
    ) -> None:
        """meeting_point: what rank 0's `meet` gave, for the other ranks."""
        hide_unreserved_gpus()
        torch.set_num_threads(config.learner.threads)
        self.name = name
        self.group = group
        self.rank = rank
        self.config = config
        self.run_dir = Path(config.run.dir) / config.run.name
        self.device = "cuda" if ray.get_gpu_ids() else "cpu"
        self.meeting: Meeting | None = None
        if config.learner.count > 1:
            # Ranks of a cluster that was started here are all on this machine: nobody else need reach them.
            own = "127.0.0.1" if config.ray.address is None else ray.util.get_node_ip_address()
            self.meeting = Meeting(own, meeting_point)

    def __repr__(self) -> str:
        return self.name

    def meet(self) -> tuple[str, int]:
        """Address and port where rank 0 waits for the others."""
        assert self.meeting is not None
        return self.meeting.address, self.meeting.port

    @judged
    def run(self, buffer: ray.actor.ActorHandle) -> None:
        """Works until the driver ends it. Raises UserError when the model or a recovery point cannot be loaded, and
        RunStopped when training cannot go on."""
        self._check_run_folder()
        clock = Clock()
        with clock.on("loading the model"):
            ranks = self._ranks()
            learner = self._load(ranks)
        if ranks.first and call(buffer.current) is None:
            self._register_first(learner, buffer)
        while True:
            taken: TakenBatch | None = ask(clock, "batches", buffer.take, self.group, self.name)
            if taken is None:
                continue
            with clock.on("loading weights"):
                if taken.version != learner.version:
                    self._restore(learner, buffer)
            with clock.on("waiting for other ranks"):
                ranks.agree("weights and batches", f"{learner.version.digest} {taken.roster}")
            with clock.on("training"):
                trained = learner.train(batch_of(taken.batch, taken.table, tuple(self.config.rewards)))
            with clock.on("saving"):
                another = ranks.first and self._register(learner, taken, trained.advantages, buffer)
            with clock.on("waiting for other ranks"):
                another = ranks.any(another)
            if another:
                self._restore(learner, buffer)

    def _restore(self, learner: Learner, buffer: ray.actor.ActorHandle) -> None:
        version, recovery_point = call(buffer.current)
        learner.restore(self.run_dir / recovery_point, version)

    def _check_run_folder(self) -> None:
        if not (self.run_dir / "config.yaml").is_file():
            raise UserError(
                f"{self.name} runs on host {socket.gethostname()}, which does not see the run folder {self.run_dir}: "
                "put run.dir on a file system that all hosts share, or let all ranks fit on the driver's host"
            )

    def _ranks(self) -> Ranks:
        if self.meeting is None:
            return Ranks()
        return Ranks.join(self.rank, self.config.learner.count, self.meeting, self.device)

    def _load(self, ranks: Ranks) -> Learner:
        config = self.config
        checkpointing = config.learner.gradient_checkpointing
        policy = Policy.load(config.model, config.sampling, config.run.seed, self.device, True, checkpointing)
        return Learner(policy, config, ranks)

    def _register_first(self, learner: Learner, buffer: ray.actor.ActorHandle) -> None:
        """Version 0: the base model with the LoRA it starts from."""
        recovery_point = call(buffer.initial_recovery_point)
        learner.save(self.run_dir / recovery_point)
        call(buffer.trained, -1, learner.version, recovery_point, "")

    def _register(
        self, learner: Learner, taken: TakenBatch, advantages: np.ndarray, buffer: ray.actor.ActorHandle
    ) -> bool:
        """PROTOCOL.md 10 and 11: recovery point, Parquet file, then the buffer's word on which of them count.

        Whether another's count: then it is reloaded. Where nobody's do, the next `take` brings a version that is not
        ours, and that is reloaded.
        """
        learner.save(self.run_dir / taken.recovery_point)
        write_batch(self.run_dir, taken, advantages, now=time.time())
        try:
            counts = call(buffer.trained, taken.batch, learner.version, taken.recovery_point, taken.parquet)
        except Refused:
            return False
        return counts is not None and counts != taken.recovery_point
