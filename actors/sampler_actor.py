"""A sampler: claims an order, rolls it out at the version it is bound to, and hands the trajectories in."""

import ray
import torch

from actors.calls import Clock, ask, call
from actors.devices import hide_unreserved_gpus
from actors.ending import judged
from buffer.orders import Version
from buffer.schema import rollout_table
from common.blame import describe, is_the_workers
from conf.schema import Config
from policy.policy import Policy
from policy.rollout import NonFinite, rollout


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
    def run(self, buffer: ray.actor.ActorHandle) -> None:
        """Works until the driver ends it. Raises UserError when the model cannot be loaded, and what a rollout raises:
        another sampler then takes its place."""
        config, clock = self.config, Clock()
        with clock.on("loading the model"):
            device = "cuda" if ray.get_gpu_ids() else "cpu"
            policy = Policy.load(config.model, config.sampling, config.run.seed, device, trainable=False)
        loaded: Version | None = None
        while True:
            claimed = ask(clock, "orders", buffer.claim, self.name)
            if claimed is None:
                continue
            claim, (weights,) = claimed
            order = claim.order
            with clock.on("loading weights"):
                if claim.version != loaded:
                    policy.load_lora_state(ray.get(weights))
                    loaded = claim.version
            try:
                with clock.on("rolling out"):
                    made = rollout(policy, order.prompts, order.seeds)
            except NonFinite as error:  # of this order, and the next may be well
                call(buffer.order_failed, order.order_id, self.name, str(error))
                continue
            except Exception as error:
                if not is_the_workers(error):
                    call(buffer.order_failed, order.order_id, self.name, describe(error))
                raise  # nobody knows what it left of this process
            with clock.on("handing in"):
                table = rollout_table(order, made.latents, made.timesteps, made.log_probs, made.images)
                call(buffer.add, order.order_id, claim.version, table)
