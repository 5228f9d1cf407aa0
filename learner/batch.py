"""What the learner trains on: one batch as arrays."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from torch import Tensor, nn

from buffer.schema import tensors_of


class TrainablePolicy(Protocol):
    """What the update asks of a policy; `policy.policy.Policy` has it, and so does a test's one-parameter Gaussian."""

    def encode(self, prompts: list[str]) -> Tensor: ...
    def gaussian(
        self, latents: Tensor, step_index: Tensor, prompt_embeds: Tensor, guidance_gradient: str = "full"
    ) -> tuple[Tensor, Tensor]: ...
    def log_prob(
        self,
        latents: Tensor,
        next_latents: Tensor,
        step_index: Tensor,
        prompt_embeds: Tensor,
        guidance_gradient: str = "full",
    ) -> Tensor: ...
    def base(self) -> Any: ...
    def lora_parameters(self) -> dict[str, nn.Parameter]: ...


@dataclass(frozen=True)
class Batch:
    """n trajectories of T steps, by ascending trajectory id; n is smaller than buffer.batch_size if some were set
    aside."""

    number: int  # u: trained at version u
    prompts: tuple[str, ...]  # n
    rewards: np.ndarray  # float32 [n], what is trained on
    parts: dict[str, np.ndarray]  # float32 [n]: each reward by itself, and the numbers that rewards store beside it
    ages: np.ndarray  # int32 [n], versions between sampling and training
    ages_in_flight: np.ndarray  # int32 [n], those of them that passed before the last score; the rest passed waiting
    latents: np.ndarray  # float32 or float16 [n, T+1, C, H, W], x_T first
    log_probs: np.ndarray  # float32 [n, T], of latents[:, i + 1] given latents[:, i]

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def num_steps(self) -> int:
        """T."""
        return self.log_probs.shape[1]

    def first_steps(self, count: int | None) -> "Batch":
        """The same trajectories without the steps after the first `count`; None leaves them whole."""
        if count is None:
            return self
        return replace(self, latents=self.latents[:, : count + 1], log_probs=self.log_probs[:, :count])

    @property
    def dimensions(self) -> int:
        """D = C*H*W, over which log-probs are means."""
        return int(np.prod(self.latents.shape[2:]))


def batch_of(number: int, table: pa.Table, rewards: Sequence[str]) -> Batch:
    """The arrays of a `TakenBatch`'s table, whose tensors are not copied where they lie in one piece.

    rewards: the names of the run's rewards. Raises ValueError if the rows are not in order: every sum over them would
    have other last bits.
    """
    tensors = tensors_of(table)
    if not (np.diff(table["trajectory_id"].to_numpy()) > 0).all():
        raise ValueError(f"the rows of batch {number} are not sorted by trajectory_id")
    return Batch(
        number=number,
        prompts=tuple(table["prompt"].to_pylist()),
        rewards=table["reward"].to_numpy().astype(np.float32),
        parts=_parts(table, rewards),
        ages=table["age"].to_numpy().astype(np.int32),
        ages_in_flight=table["age_in_flight"].to_numpy().astype(np.int32),
        latents=tensors["latents"],
        log_probs=tensors["log_probs"],
    )


def _parts(table: pa.Table, rewards: Sequence[str]) -> dict[str, np.ndarray]:
    """Columns of numbers and truth values that are a reward, or a further column of one, "reward.column"."""
    chosen = [
        field.name
        for field in table.schema
        if field.name.split(".")[0] in rewards and (pa.types.is_primitive(field.type))
    ]
    return {name: table[name].cast(pa.float32()).to_numpy() for name in chosen}
