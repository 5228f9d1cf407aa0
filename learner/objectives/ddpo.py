"""The policy gradients of DDPO (Black et al. 2023, section 4.3), over pairs (trajectory, denoising step).

Each pair has one action, the next latent. Log-probs are means over the D = C*H*W dimensions, so a ratio here is the
true ratio of densities to the power 1/D; on that scale it is clipped.

Three policies appear: the one that is trained (p), the one that sampled (old, the behaviour policy), and for
`ddpo_decoupled` the one that the batch's first update started from (proximal). With fresh data the last two are one.

**Weights by step.** The gradient of log p by a step's mean is of the size 1 / std, so the last steps, whose std is
small and which decide little of the picture, drown the first. `step_weight` multiplies each pair's loss:

    equal    1, as in the paper
    std      std_i: the gradients by the means are of one size
    output   std_i / |output_scale_i|: those by the network's outputs are (as GRPO-Guard does, Wang et al. 2025)

divided by their mean over the trained steps. They change how loudly each step speaks, and not where the optimum of a
single step lies.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError, quoted
from conf.schema import LearnerConfig
from learner.batch import Batch
from learner.metrics import policy_gradient_metrics
from learner.objectives.objective import (
    Objective,
    Pairs,
    State,
    StepResult,
    TrainablePolicy,
    at,
    clipped_loss,
    gaussian_kl_to_base,
)
from policy import gaussian
from policy.gaussian import Schedule

STEP_WEIGHTS: dict[str, Callable[[Schedule], Tensor]] = {
    "equal": lambda schedule: torch.ones_like(schedule.std),
    "std": lambda schedule: schedule.std,
    "output": lambda schedule: schedule.std / schedule.output_scale.abs(),
}


@dataclass(frozen=True)
class LogProbs:
    """Of n actions, means over D."""

    new: Tensor  # [n] of the policy that is trained, differentiable
    old: Tensor  # [n] of the policy that sampled, as stored
    proximal: Tensor  # [n] of the policy before the batch's first update; `old` where that was not measured


class PolicyGradient(Objective):
    """A loss of log-probs and advantages. A child says which, in `of`."""

    measures = ("log_ratio", "ratio", "clipped", "approx_kl")
    penalises_kl = True

    def __init__(self, config: LearnerConfig, seed: int, step_weight: str = "equal") -> None:
        super().__init__(config, seed)
        if step_weight not in STEP_WEIGHTS:
            raise UserError(f"step_weight={quoted(step_weight)} is none of {', '.join(STEP_WEIGHTS)}: choose one.")
        self.step_weight = step_weight

    @abstractmethod
    def of(self, log_probs: LogProbs, advantages: Tensor) -> tuple[Tensor, Tensor]:
        """The loss [n], and the log-ratio [n] that is clipped, or would be."""

    def draw(self, batch: Batch) -> list[Pairs]:
        """Every trained step of each optimizer step's share of the batch's trajectories.

        Trajectories are shuffled, and each has its own order of steps, as in the paper's code; a microbatch so holds
        many trajectories, and many steps. A batch smaller than its size has smaller shares, at least one trajectory in
        each.
        """
        count = self.config.train_steps or batch.num_steps
        generator = self.generator(batch, 0)
        order = generator.permutation(len(batch))
        steps = generator.permuted(np.tile(np.arange(count), (len(batch), 1)), axis=1)
        return [Pairs(rows=np.tile(rows, count), steps=steps[rows].T.reshape(-1)) for rows in self.shares(order)]

    def loss(self, policy: TrainablePolicy, batch: Batch, pairs: Pairs, advantages: Tensor) -> dict[str, Tensor]:
        state = _states(policy, batch, pairs)
        mean, std = policy.gaussian(*state, self.config.guidance_gradient)
        new = gaussian.log_prob(at(batch.latents, pairs.rows, pairs.steps + 1).to(mean), mean, std)
        old = at(batch.log_probs, pairs.rows, pairs.steps).to(new)
        proximal = old if pairs.before is None else torch.from_numpy(pairs.before).to(new)
        loss, clipped_log_ratio = self.of(LogProbs(new, old, proximal), advantages.to(new))
        loss = self.step_weights(policy.schedule).to(loss)[torch.from_numpy(pairs.steps)] * loss
        if self.kl_weight:
            loss = loss + self.kl_weight * gaussian_kl_to_base(policy, state, mean, std)
        with torch.no_grad():
            ratio = clipped_log_ratio.exp()
            return {
                "loss": loss,
                "log_ratio": new.detach() - old,
                "ratio": ratio,  # what is clipped
                "clipped": (ratio - 1).abs() > self.config.clip_range,
                "approx_kl": 0.5 * clipped_log_ratio**2,  # k2 of Schulman 2020, on the scale of the mean over D
            }

    def step_weights(self, schedule: Schedule) -> Tensor:
        """[trained steps] float64, of mean 1."""
        weights = STEP_WEIGHTS[self.step_weight](schedule)[: self.config.train_steps]
        return weights / weights.mean()

    def kl_to_base(self, policy: TrainablePolicy, batch: Batch, pairs: Pairs) -> Tensor:
        state = _states(policy, batch, pairs)
        return gaussian_kl_to_base(policy, state, *policy.gaussian(*state))

    def metrics(self, batch: Batch, steps: Sequence[StepResult]) -> dict[str, float]:
        return policy_gradient_metrics(batch, steps)


class ImportanceSampling(PolicyGradient):
    """DDPO_IS, importance-weighted, with PPO's clipping: ratio = p / p_old."""

    def of(self, log_probs: LogProbs, advantages: Tensor) -> tuple[Tensor, Tensor]:
        log_ratio = log_probs.new - log_probs.old
        return clipped_loss(log_ratio, advantages, self.config.clip_range), log_ratio


class ScoreFunction(PolicyGradient):
    """DDPO_SF, the score function (REINFORCE), for one optimizer step on fresh samples: -A log p.

    Where the ratio is 1 its gradient is that of DDPO_IS. Nothing is cut; `clipped` says what would have been.
    """

    takes_stale_data = False

    def of(self, log_probs: LogProbs, advantages: Tensor) -> tuple[Tensor, Tensor]:
        return -advantages * log_probs.new, log_probs.new - log_probs.old


class Decoupled(PolicyGradient):
    """DDPO_IS for data of several versions ago: PPO's decoupled objective (Hilton et al. 2021, "Batch size-invariance
    for policy optimization", section 3; with a truncated weight in AReaL, Fu et al. 2025).

    w max(-A ratio, -A clip(ratio, 1 - c, 1 + c)),  ratio = p / p_proximal,  w = min(p_proximal / p_old, 1 + c)

    The clip range so bounds what this batch moves, and not how far the policy has moved since the data were sampled:
    plain clipping would leave out most pairs before the first update. The weight, like the ratio, is of means over D,
    and is truncated on that scale; at the true scale's 2 or 5 it would never be.
    """

    def before(self, policy: TrainablePolicy, batch: Batch, pairs: Pairs) -> Tensor:
        x, step_index, conditioning = _states(policy, batch, pairs)
        x_next = at(batch.latents, pairs.rows, pairs.steps + 1)
        return policy.log_prob(x, x_next, step_index, conditioning, self.config.guidance_gradient)

    def of(self, log_probs: LogProbs, advantages: Tensor) -> tuple[Tensor, Tensor]:
        weight = (log_probs.proximal - log_probs.old).exp().clamp(max=1 + self.config.clip_range)
        log_ratio = log_probs.new - log_probs.proximal
        return weight * clipped_loss(log_ratio, advantages, self.config.clip_range), log_ratio


def _states(policy: TrainablePolicy, batch: Batch, pairs: Pairs) -> State:
    return (
        at(batch.latents, pairs.rows, pairs.steps),
        torch.from_numpy(pairs.steps),
        policy.encode([batch.prompts[row] for row in pairs.rows]),
    )
