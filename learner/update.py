"""The update of DDPO: one batch of trajectories, one or more optimizer steps on the LoRA weights.

    for each optimizer step, with its share of the batch's trajectories (Black et al. 2023, section 4.3):
        for every pair (trajectory, timestep) of the share, in microbatches:
            log p   = log N(x_next; mean(x, t, c), std^2)    a mean over C,H,W      policy/gaussian.py
            ratio   = exp(log p - log p_old)                                        learner/losses.py
            loss    = max(-A ratio, -A clip(ratio, 1 - c, 1 + c)) / number of pairs
            accumulate the gradient of loss
        sum the gradient over the learner's ranks, clip its norm, take a step of AdamW

docs/algorithm.md has the equations beside the lines. Every random choice follows from (seed, batch number).
"""

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from common.blame import is_out_of_memory
from common.errors import RunStopped
from conf.schema import LearnerConfig
from learner.batch import Batch, TrainablePolicy
from learner.losses import LOSSES, LossInputs, LossOutputs, ddpo_decoupled, joined, of_no_pairs
from learner.ranks import Ranks

logger = logging.getLogger(__name__)
T = TypeVar("T")

STREAM = 2  # of random numbers beside buffer.orders' 0 and 1
KL_PAIRS = 64  # on which the KL to the base model is measured: about a twentieth of a small batch's computing time
NON_FINITE_IN_A_ROW = 3


@dataclass(frozen=True)
class Pairs:
    """n (trajectory, timestep) pairs of a batch."""

    rows: np.ndarray  # int64 [n], of the batch
    steps: np.ndarray  # int64 [n], 0..T-1

    def __len__(self) -> int:
        return len(self.rows)

    def split(self, size: int) -> Iterator["Pairs"]:
        for start in range(0, len(self), size):
            yield Pairs(self.rows[start : start + size], self.steps[start : start + size])


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step saw. Arrays are float32 [pairs], in the order of `pairs`."""

    pairs: Pairs
    taken: bool  # False: loss or gradient was not finite, and the weights are as before
    loss: float
    grad_norm: float  # before clipping
    log_ratio: np.ndarray  # log p - log p_old, a mean over C,H,W
    ratio: np.ndarray  # what is clipped, see learner/losses.py
    clipped: np.ndarray  # bool
    approx_kl: np.ndarray  # on the scale of the mean over C,H,W


@dataclass(frozen=True)
class BaseKL:
    """KL(policy || base model) at the states of a batch, before it is trained on.

    Both are Gaussians of one std, so a step's is |mean - mean_base|^2 / (2 std^2), exactly; what is estimated is its
    mean over the batch's pairs.
    """

    trajectory: float  # nats: summed over C,H,W, times T. The KL of whole trajectories, if the batch is of age 0
    dimension: float  # nats per step and dimension: the scale of log-probs, ratios and the clip range


class Updater:
    """The optimizer and what it trains. `microbatch` shrinks when memory runs out.

    With several ranks, every rank has an Updater and makes the same calls with the same batches; results are the same
    on all of them.
    """

    def __init__(
        self,
        policy: TrainablePolicy,
        config: LearnerConfig,
        seed: int,
        decoupled: bool = False,
        ranks: Ranks | None = None,
    ) -> None:
        self.policy = policy
        self.config = config
        self.seed = seed
        self.decoupled = decoupled
        self.ranks = ranks or Ranks()
        self.parameters = policy.lora_parameters()
        self.like = next(iter(self.parameters.values())).detach()  # log-probs have its dtype, and are where it is
        self.optimizer = torch.optim.AdamW(
            list(self.parameters.values()), lr=config.lr, betas=config.betas, weight_decay=config.weight_decay
        )
        self.loss = ddpo_decoupled if decoupled else LOSSES[config.algorithm]
        self.microbatch = config.microbatch
        self.halvings = 0
        self.non_finite_in_a_row = 0

    def train(self, batch: Batch, advantages: np.ndarray) -> list[StepResult]:
        """Takes the batch's optimizer steps; advantages: float32 [n].

        Raises RunStopped at the third optimizer step in a row that is not finite, or if one pair does not fit into
        memory.
        """
        steps = shares(batch, self.config.optimizer_steps, self.seed)
        proximal = self.proximal_log_probs(batch, steps) if self.decoupled else None
        return [self._optimizer_step(batch, advantages, pairs, proximal) for pairs in steps]

    def _optimizer_step(
        self, batch: Batch, advantages: np.ndarray, pairs: Pairs, proximal: np.ndarray | None
    ) -> StepResult:
        outputs = self.within_memory(lambda microbatch: self.gradient(batch, advantages, pairs, microbatch, proximal))
        self.ranks.sum(parameter.grad for parameter in self.parameters.values() if parameter.grad is not None)
        loss, log_ratio, ratio, clipped, approx_kl = self.ranks.gather(_stacked(outputs))
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.config.max_grad_norm).item()
        mean_loss = loss.mean().item()
        taken = math.isfinite(mean_loss) and math.isfinite(norm)
        if taken:
            self.optimizer.step()
            self.non_finite_in_a_row = 0
        self.optimizer.zero_grad()
        if not taken:
            self._count_non_finite(batch.number, mean_loss, norm)
        return StepResult(
            pairs=pairs,
            taken=taken,
            loss=mean_loss,
            grad_norm=norm,
            ratio=ratio.numpy(),
            log_ratio=log_ratio.numpy(),
            clipped=clipped.numpy().astype(bool),
            approx_kl=approx_kl.numpy(),
        )

    def gradient(
        self,
        batch: Batch,
        advantages: np.ndarray,
        pairs: Pairs,
        microbatch: int,
        proximal: np.ndarray | None = None,
    ) -> LossOutputs:
        """Leaves in `.grad` this rank's part of the gradient of the mean loss over `pairs` (the sum over ranks is the
        whole), whatever `microbatch` is; nothing is stepped.

        proximal: float [n, T], for the decoupled objective; by default the behaviour policy's log-probs. Returns the
        losses of this rank's part, without their graphs, in the order of `pairs`.
        """
        for parameter in self.parameters.values():  # zeros, not None: a rank may have no pairs at all
            parameter.grad = torch.zeros_like(parameter)
        parts = self._mine(pairs).split(microbatch)
        losses = [self._backward(batch, advantages, part, len(pairs), proximal) for part in parts]
        return joined([of_no_pairs(self.like), *losses])

    def _backward(
        self, batch: Batch, advantages: np.ndarray, part: Pairs, count: int, proximal: np.ndarray | None
    ) -> LossOutputs:
        """Adds the part's share of the gradient of `count` pairs. A function of its own: with it the graph ends."""
        log_probs = self._log_probs(batch, part)
        measured = batch.log_probs if proximal is None else proximal
        outputs = self.loss(
            LossInputs(
                log_probs=log_probs,
                old_log_probs=_tensor(batch.log_probs, part.rows, part.steps).to(log_probs),
                proximal_log_probs=_tensor(measured, part.rows, part.steps).to(log_probs),
                advantages=_tensor(advantages, part.rows).to(log_probs),
                clip_range=self.config.clip_range,
            )
        )
        (outputs.loss.sum() / count).backward()
        return outputs.without_graph()

    @torch.no_grad()
    def proximal_log_probs(self, batch: Batch, steps: list[Pairs]) -> np.ndarray:
        """float [n, T]: log-probs of the present policy at this rank's part of each step's pairs, and nan elsewhere."""
        proximal = np.full_like(batch.log_probs, np.nan)
        for pairs in steps:
            mine = self._mine(pairs)

            def measure(microbatch: int, mine: Pairs = mine) -> Tensor:
                parts = [self._log_probs(batch, part).cpu() for part in mine.split(microbatch)]
                return torch.cat([self.like.new_empty(0).cpu(), *parts])

            proximal[mine.rows, mine.steps] = self.within_memory(measure).numpy()
        return proximal

    def _mine(self, pairs: Pairs) -> Pairs:
        """This rank's part: of the same size on all ranks, but for one."""
        part = self.ranks.part(len(pairs))
        return Pairs(pairs.rows[part], pairs.steps[part])

    def _log_probs(self, batch: Batch, pairs: Pairs) -> Tensor:
        return self.policy.log_prob(
            _tensor(batch.latents, pairs.rows, pairs.steps),
            _tensor(batch.latents, pairs.rows, pairs.steps + 1),
            torch.from_numpy(pairs.steps),
            self.policy.encode([batch.prompts[row] for row in pairs.rows]),
            self.config.guidance_gradient,
        )

    @torch.no_grad()
    def kl_to_base(self, batch: Batch) -> BaseKL:
        """Measured on a seeded subset of the batch's pairs, each rank at its part."""
        chosen = _generator(self.seed, batch.number, 1).choice(
            len(batch) * batch.num_steps, min(KL_PAIRS, len(batch) * batch.num_steps), replace=False
        )
        pairs = Pairs(*np.divmod(chosen, batch.num_steps))

        def measure(microbatch: int) -> float:
            total = 0.0
            for part in self._mine(pairs).split(microbatch):
                state = (
                    _tensor(batch.latents, part.rows, part.steps),
                    torch.from_numpy(part.steps),
                    self.policy.encode([batch.prompts[row] for row in part.rows]),
                )
                mean, std = self.policy.gaussian(*state)
                with self.policy.base():
                    base_mean, _ = self.policy.gaussian(*state)
                total += ((mean - base_mean) ** 2 / (2 * std**2)).mean(dim=(1, 2, 3)).sum().item()
            return total

        total = torch.tensor(self.within_memory(measure), dtype=torch.float64)
        self.ranks.sum([total])
        dimension = total.item() / len(pairs)
        return BaseKL(trajectory=dimension * batch.dimensions * batch.num_steps, dimension=dimension)

    def within_memory(self, work: Callable[[int], T]) -> T:
        """`work(microbatch)`, started again with half the microbatch as often as memory runs out."""
        while True:
            try:
                return work(self.microbatch)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if self.microbatch == 1:
                    raise RunStopped(self._does_not_fit()) from None
            # outside the handler, where the failed attempt's tensors are no longer held by its traceback
            self.microbatch //= 2
            self.halvings += 1
            torch.cuda.empty_cache()
            logger.warning("out of memory: the learner goes on with learner.microbatch=%d", self.microbatch)

    def _does_not_fit(self) -> str:
        """Checkpointing may be set when a run goes on. The dtype may not: it changes what is computed."""
        first = "" if self.config.gradient_checkpointing else "set learner.gradient_checkpointing=true, or "
        return (
            f"The learner runs out of memory with one (trajectory, timestep) pair at a time; {first}give it a larger "
            "GPU or one of its own, and the same command goes on; or take model.dtype=bfloat16 under another run.name."
        )

    def _count_non_finite(self, batch: int, loss: float, norm: float) -> None:
        self.non_finite_in_a_row += 1
        logger.warning("batch %d: no step taken, loss %g, gradient norm %g", batch, loss, norm)
        if self.non_finite_in_a_row == NON_FINITE_IN_A_ROW:
            raise RunStopped(
                f"{NON_FINITE_IN_A_ROW} optimizer steps in a row, the last in batch {batch}, had a loss ({loss:g}) or "
                f"a gradient (norm {norm:g}) that is not finite; start a new run with a smaller learner.lr, or with "
                "model.dtype=float32."
            )


def shares(batch: Batch, optimizer_steps: int, seed: int) -> list[Pairs]:
    """The pairs of each optimizer step: every timestep of its share of the batch's trajectories.

    Trajectories are shuffled, and each has its own order of timesteps, as in the paper's code; a microbatch so holds
    many trajectories, and many timesteps. A batch smaller than its size has smaller shares, at least one trajectory
    in each.
    """
    generator = _generator(seed, batch.number, 0)
    order = generator.permutation(len(batch))
    timesteps = generator.permuted(np.tile(np.arange(batch.num_steps), (len(batch), 1)), axis=1)
    return [
        Pairs(rows=np.tile(rows, batch.num_steps), steps=timesteps[rows].T.reshape(-1))
        for rows in np.array_split(order, min(optimizer_steps, len(batch)))
    ]


def _stacked(outputs: LossOutputs) -> Tensor:
    """[5, n] without graphs, in the dtype of the log-probs."""
    rows = (outputs.loss, outputs.log_ratio, outputs.ratio, outputs.clipped, outputs.approx_kl)
    return torch.stack([row.detach().to(outputs.ratio) for row in rows])


def _generator(seed: int, batch: int, use: int) -> np.random.Generator:
    return np.random.default_rng([seed, STREAM, batch, use])


def _tensor(array: np.ndarray, *index: np.ndarray) -> Tensor:
    return torch.from_numpy(array[index])  # indexing by arrays copies, so a read-only view of Arrow's memory will do
