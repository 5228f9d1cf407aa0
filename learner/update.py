"""The update: one batch of trajectories, one or more optimizer steps on the LoRA weights, whatever the objective is.

    for each optimizer step, with its share of the batch's pairs:
        for every microbatch of pairs:
            loss of each pair                       learner/objectives/
            accumulate the gradient of their sum / number of pairs of the step
        sum the gradient over the learner's ranks, clip its norm, take a step of AdamW

docs/algorithm.md has the equations beside the lines.
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from common.blame import is_out_of_memory
from common.errors import RunStopped, UserError
from conf.schema import LearnerConfig
from learner.batch import Batch
from learner.objectives.objective import Objective, Pairs, StepResult, TrainablePolicy, at
from learner.ranks import Ranks

logger = logging.getLogger(__name__)
T = TypeVar("T")

KL_PAIRS = 64  # on which the KL to the base model is measured: about a twentieth of a small batch's computing time
NON_FINITE_IN_A_ROW = 3


@dataclass(frozen=True)
class BaseKL:
    """KL(policy || base model) at the states of a batch, before it is trained on; estimated on some of its pairs."""

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
        objective: Objective,
        config: LearnerConfig,
        ranks: Ranks | None = None,
    ) -> None:
        self.policy = policy
        self.objective = objective
        self.config = config
        self.ranks = ranks or Ranks()
        self.parameters = policy.lora_parameters()
        self.like = next(iter(self.parameters.values())).detach()  # losses have its dtype, and are where it is
        self.optimizer = torch.optim.AdamW(
            list(self.parameters.values()), lr=config.lr, betas=config.betas, weight_decay=config.weight_decay
        )
        self.microbatch = config.microbatch
        self.halvings = 0
        self.non_finite_in_a_row = 0

    def train(
        self, batch: Batch, advantages: np.ndarray, sampling: Mapping[str, Tensor] | None = None
    ) -> list[StepResult]:
        """Takes the batch's optimizer steps; advantages: float32 [n]; sampling: the LoRA of the policy that samples,
        where that follows slowly.

        Raises RunStopped at the third optimizer step in a row that is not finite, or if one pair does not fit into
        memory.
        """
        with self._as(sampling):
            steps = [self._with_before(batch, pairs) for pairs in self.objective.draw(batch)]
        return [self._optimizer_step(batch, advantages, pairs) for pairs in steps]

    def _optimizer_step(self, batch: Batch, advantages: np.ndarray, pairs: Pairs) -> StepResult:
        measured = self.within_memory(lambda microbatch: self.gradient(batch, advantages, pairs, microbatch))
        self.ranks.sum(parameter.grad for parameter in self.parameters.values() if parameter.grad is not None)
        gathered = self.ranks.gather(torch.stack([row.to(measured["loss"]) for row in measured.values()]))
        arrays = dict(zip(measured, gathered, strict=True))
        loss = arrays.pop("loss")
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
            measured={name: array.numpy() for name, array in arrays.items()},
        )

    def gradient(self, batch: Batch, advantages: np.ndarray, pairs: Pairs, microbatch: int) -> dict[str, Tensor]:
        """Leaves in `.grad` this rank's part of the gradient of the mean loss over `pairs` (the sum over ranks is the
        whole), whatever `microbatch` is; nothing is stepped.

        Returns loss and measurements of this rank's part [n], without their graphs, in the order of `pairs`.
        """
        for parameter in self.parameters.values():  # zeros, not None: a rank may have no pairs at all
            parameter.grad = torch.zeros_like(parameter)
        none = self.like.new_empty(0)
        parts = [dict.fromkeys(("loss", *self.objective.measures), none)]
        parts += [self._backward(batch, advantages, part, len(pairs)) for part in self._mine(pairs).split(microbatch)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _backward(self, batch: Batch, advantages: np.ndarray, part: Pairs, count: int) -> dict[str, Tensor]:
        """Adds the part's share of the gradient of `count` pairs. A function of its own: with it the graph ends."""
        outputs = self.objective.loss(self.policy, batch, part, at(advantages, part.rows))
        wanted = dict.fromkeys(("loss", *self.objective.measures), (len(part),))
        if (given := {name: tuple(values.shape) for name, values in outputs.items()}) != wanted:
            raise UserError(f"{type(self.objective).__name__}.loss gave {given}; its docstring wants {wanted}.")
        (outputs["loss"].sum() / count).backward()
        return {name: values.detach().to(self.like) for name, values in outputs.items()}

    @contextmanager
    def _as(self, weights: Mapping[str, Tensor] | None) -> Iterator[None]:
        """Inside, the policy has these LoRA weights; None: its own."""
        own = {name: parameter.detach().clone() for name, parameter in self.parameters.items()} if weights else {}
        try:
            self._assign(weights or {})
            yield
        finally:
            self._assign(own)

    @torch.no_grad()
    def _assign(self, weights: Mapping[str, Tensor]) -> None:
        for name, weight in weights.items():
            self.parameters[name].copy_(weight)

    @torch.no_grad()
    def _with_before(self, batch: Batch, pairs: Pairs) -> Pairs:
        """With what the objective measures before the batch's first step, at this rank's part; nan elsewhere."""
        part = self.ranks.part(len(pairs))

        def measure(microbatch: int) -> list[Tensor | None]:
            return [self.objective.before(self.policy, batch, piece) for piece in pairs.take(part).split(microbatch)]

        found = [values.cpu().numpy() for values in self.within_memory(measure) if values is not None]
        if not found:
            return pairs
        before = np.full((len(pairs), *found[0].shape[1:]), np.nan, found[0].dtype)
        before[part] = np.concatenate(found)
        return replace(pairs, before=before)

    def _mine(self, pairs: Pairs) -> Pairs:
        """This rank's part: of the same size on all ranks, but for one."""
        return pairs.take(self.ranks.part(len(pairs)))

    @torch.no_grad()
    def kl_to_base(self, batch: Batch, sampling: Mapping[str, Tensor] | None = None) -> BaseKL | None:
        """Of the policy that samples (see `train`), measured on a seeded subset of the batch's pairs, each rank at its
        part; None if the objective has none."""
        steps = len(self.policy.schedule)
        count = len(batch) * steps
        chosen = self.objective.generator(batch, 1).choice(count, min(KL_PAIRS, count), replace=False)
        pairs = Pairs(*np.divmod(chosen, steps))

        def measure(microbatch: int) -> list[Tensor | None]:
            return [self.objective.kl_to_base(self.policy, batch, part) for part in self._mine(pairs).split(microbatch)]

        with self._as(sampling):
            found = [values for values in self.within_memory(measure) if values is not None]
        sums = torch.tensor([sum(values.sum().item() for values in found), sum(map(len, found))], dtype=torch.float64)
        self.ranks.sum([sums])
        total, measured = sums.tolist()
        if not measured:
            return None
        dimension = total / measured
        return BaseKL(trajectory=dimension * batch.dimensions * steps, dimension=dimension)

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
