"""A scorer in an actor."""

from typing import Any

import torch
from ray.actor import ActorHandle

from actors.devices import hide_unreserved_gpus
from actors.ending import judged
from actors.remote_buffer import RemoteBuffer
from common.blame import describe, is_the_workers
from common.clock import Clock
from common.errors import UserError
from common.precision import exact_float32
from conf.schema import RewardConfig
from rewards.base import NamedReward, the_machines, try_out
from rewards.registry import resolve
from workers.scorer import Scorer


class RewardActor:
    """One of the pool of one reward. Its name says role, index and incarnation."""

    def __init__(self, name: str, reward: str, config: RewardConfig) -> None:
        hide_unreserved_gpus()
        exact_float32()
        torch.set_num_threads(config.threads)
        self.name = name
        self.reward_name = reward
        self.config = config
        self.reward: NamedReward | None = None

    def __repr__(self) -> str:
        return self.name

    def prepare(self, prompts: list[str], image_size: tuple[int, int]) -> str | None:
        """Loads the reward and tries it on two pictures. What is wrong with it, in a sentence; None when nothing is."""
        try:
            try_out(self._loaded(), prompts, image_size)
        except UserError as error:
            return str(error)
        except Exception as error:
            if not is_the_workers(error):
                raise
            return str(the_machines(self.reward_name, error))
        except BaseException as error:  # noqa: BLE001  (a user's code may raise anything, and the user is told)
            return f"Reward {self.reward_name} failed on two pictures: it raised {describe(error)}; mend it."
        return None

    @judged
    def run(self, buffer: ActorHandle[Any]) -> None:
        """Works until the driver ends it. Raises UserError when the reward cannot be loaded, and what `Scorer.step`
        does."""
        clock = Clock()
        with clock.on("loading the reward"):
            reward = self._loaded()
        scorer = Scorer(self.name, reward, self.config.batch_size, RemoteBuffer(buffer, self.name, clock), clock)
        while True:
            scorer.step()

    def _loaded(self) -> NamedReward:
        if self.reward is None:
            self.reward = resolve(self.reward_name, self.config.path, self.config.args)
        return self.reward
