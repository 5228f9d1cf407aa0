"""A rank of the learner in an actor.

Where one rank dies the others' sums never come, and the fleet ends the whole group and starts another, which goes on
from the recovery point.
"""

import socket
from pathlib import Path
from typing import Any

import ray
import torch
from ray.actor import ActorHandle

from actors.devices import hide_unreserved_gpus
from actors.ending import judged
from actors.remote_buffer import RemoteBuffer
from common.clock import Clock
from common.errors import UserError
from conf.schema import Config
from learner.learner import Learner
from learner.ranks import Meeting, Ranks
from workers.trainer import Trainer


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
    def run(self, buffer: ActorHandle[Any]) -> None:
        """Works until the driver ends it. Raises UserError when the model cannot be loaded or the run folder is not
        seen, and what `Trainer.step` does."""
        self._check_run_folder()
        clock = Clock()
        with clock.on("loading the model"):
            learner = Learner.load(self.config, self.device, self._ranks())
        trainer = Trainer(self.group, learner, RemoteBuffer(buffer, self.name, clock), self.run_dir, clock)
        trainer.begin()
        while True:
            trainer.step()

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
