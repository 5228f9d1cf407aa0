"""A sampler: claims an order, rolls it out at the version it is bound to, and hands the trajectories in."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from buffer.orders import Order, Version
from buffer.protocol import Buffer
from buffer.schema import rollout_table
from common.blame import describe, is_the_workers
from common.clock import Clock
from common.errors import RunStopped
from conf.evaluations import EvaluationSet, sets_of
from conf.schema import Config
from learner.objectives.objective import Needs
from policy.policy import Policy
from policy.rollout import NonFinite, Rollout, rollout


def policies_of(policy: Policy, config: Config) -> dict[str, Policy]:
    """By evaluation set, and "" for batches: one network with one LoRA, each sampled in its own way."""

    def of(one: EvaluationSet) -> Policy:  # a schedule of its own reads the model's scheduler again
        same = one.sampling == config.sampling and one.lora_scale == 1
        return policy if same else policy.with_sampling(one.sampling, one.lora_scale)

    return {"": policy} | {name: of(one) for name, one in sets_of(config).items()}


class Sampler:
    """Call `step` again and again."""

    def __init__(
        self,
        name: str,
        policies: Mapping[str, Policy],
        needs: Needs,
        buffer: Buffer,
        fetch: Callable[[Any], Mapping[str, Tensor]],
        clock: Clock,
        stored: Callable[[Order], Rollout] | None = None,
    ) -> None:
        """policies: see `policies_of`. needs: what the objective trains on, and is stored. fetch: the LoRA of what a
        version was published with. stored: where a replay takes batches from, in the place of rolling them out."""
        self.name = name
        self.policies = policies
        self.policy = policies[""]
        self.needs = needs
        self.buffer = buffer
        self.fetch = fetch
        self.clock = clock
        self.stored = stored
        self.loaded: Version | None = None

    def begin(self) -> None:
        """Encodes the run's prompts, and lets go of the text encoders."""
        self.policy.prompts.fill(self.buffer.prompts())

    def step(self) -> bool:
        """Whether there was an order. Raises what a rollout raises: nobody knows what that left of this process, so
        another sampler has to take its place."""
        claim = self.buffer.claim(self.name)
        if claim is None:
            return False
        order = claim.order
        with self.clock.on("loading weights"):
            if claim.version != self.loaded:
                self.policy.load_lora_state(self.fetch(claim.weights))
                self.loaded = claim.version
        try:
            with self.clock.on("rolling out"):
                made = self._made(order)
        except NonFinite as error:  # of this order, and the next may be well
            self.buffer.order_failed(order.order_id, self.name, str(error))
            return True
        except Exception as error:
            if not (is_the_workers(error) or isinstance(error, RunStopped)):
                self.buffer.order_failed(order.order_id, self.name, describe(error))
            raise
        with self.clock.on("handing in"):
            path = {"latents": made.latents, "timesteps": made.timesteps, "log_probs": made.log_probs}
            if order.evaluation:  # nobody trains on it
                path = {}
            elif self.needs != "steps":
                path = {"latents": made.latents[:, -1:]}
            table = rollout_table(order, made.images, path)
            self.buffer.add(order.order_id, claim.version, table)
        return True

    def _made(self, order: Order) -> Rollout:
        if self.stored is not None and not order.evaluation:
            return self.stored(order)
        policy = self.policies[order.evaluation.set if order.evaluation else ""]
        return rollout(policy, order.prompts, order.seeds, order.noise_seeds)
