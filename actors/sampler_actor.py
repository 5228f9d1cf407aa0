"""A sampler in an actor."""

from typing import Any

import ray
import torch
from ray.actor import ActorHandle

from actors.devices import hide_unreserved_gpus
from actors.ending import judged
from actors.remote_buffer import RemoteBuffer
from common.clock import Clock
from conf.schema import Config
from learner.registry import make_objective
from policy.policy import Policy
from workers.sampler import Sampler, policies_of


class SamplerActor:
    """Its name says role, index and incarnation."""

    def __init__(self, name: str, config: Config) -> None:
        hide_unreserved_gpus()
        torch.set_num_threads(config.samplers.threads)
        self.name = name
        self.config = config

    def __repr__(self) -> str:
        return self.name

    @judged
    def run(self, buffer: ActorHandle[Any]) -> None:
        """Works until the driver ends it. Raises UserError when the model cannot be loaded, and what a rollout raises:
        another sampler then takes its place."""
        config, clock = self.config, Clock()
        with clock.on("loading the model"):
            device = "cuda" if ray.get_gpu_ids() else "cpu"
            policy = Policy.load(config.model, config.sampling, config.run.seed, device, trainable=False)
            remote = RemoteBuffer(buffer, self.name, clock)
            needs = make_objective(config).needs
            policies = policies_of(policy, config)
            sampler = Sampler(self.name, policies, needs, remote, lambda weights: ray.get(weights[0]), clock)
            sampler.begin()
        while True:
            sampler.step()
