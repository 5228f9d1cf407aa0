"""What the learner trains on: one batch as arrays."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from buffer.schema import tensors_of


@dataclass(frozen=True)
class Batch:
    """n trajectories of T steps, by ascending trajectory id; n is smaller than buffer.batch_size if some were set
    aside."""

    number: int  # u: trained at version u
    prompts: tuple[str, ...]  # n
    rewards: np.ndarray  # float32 [n], what is trained on
    parts: dict[str, np.ndarray]  # float32 [n]: each reward by itself, and the numbers that rewards store beside it
    groups: np.ndarray  # int64 [n], equal for pictures of one group: see `groups_of`
    ages: np.ndarray  # int32 [n], versions between sampling and training
    ages_in_flight: np.ndarray  # int32 [n], those of them that passed before the last score; the rest passed waiting
    latents: np.ndarray  # float32 or float16 [n, T+1, C, H, W], x_T first; of an objective on clean pictures the last
    log_probs: np.ndarray  # float32 [n, T], of latents[:, i + 1] given latents[:, i]; T is 0 where only that is stored

    def __len__(self) -> int:
        return len(self.prompts)

    def take(self, rows: np.ndarray) -> "Batch":
        """Some of the trajectories. rows: int64, ascending."""
        return Batch(
            number=self.number,
            prompts=tuple(self.prompts[row] for row in rows),
            rewards=self.rewards[rows],
            parts={name: values[rows] for name, values in self.parts.items()},
            groups=self.groups[rows],
            ages=self.ages[rows],
            ages_in_flight=self.ages_in_flight[rows],
            latents=self.latents[rows],
            log_probs=self.log_probs[rows],
        )

    @property
    def num_steps(self) -> int:
        """T."""
        return int(self.log_probs.shape[1])

    @property
    def dimensions(self) -> int:
        """D = C*H*W, over which log-probs are means."""
        return int(np.prod(self.latents.shape[2:]))


def batch_of(number: int, table: pa.Table, rewards: Sequence[str], group_size: int = 1) -> Batch:
    """The arrays of a `TakenBatch`'s table, whose tensors are not copied where they lie in one piece.

    rewards: the names of the run's rewards. group_size: buffer.group_size. Raises ValueError if the rows are not in
    order: every sum over them would have other last bits.
    """
    tensors = tensors_of(table)
    ids, prompts = table["trajectory_id"].to_numpy(), tuple(table["prompt"].to_pylist())
    if not (np.diff(ids) > 0).all():
        raise ValueError(f"the rows of batch {number} are not sorted by trajectory_id")
    return Batch(
        number=number,
        prompts=prompts,
        rewards=table["reward"].to_numpy().astype(np.float32),
        parts=_parts(table, rewards),
        groups=groups_of(ids, prompts, group_size),
        ages=table["age"].to_numpy().astype(np.int32),
        ages_in_flight=table["age_in_flight"].to_numpy().astype(np.int32),
        latents=tensors["latents"],
        log_probs=tensors.get("log_probs", np.empty((table.num_rows, 0), np.float32)),
    )


def groups_of(ids: np.ndarray, prompts: Sequence[str], group_size: int) -> np.ndarray:
    """int64 [n]: the pictures that were drawn together; with a group_size of 1, those of one prompt."""
    if group_size > 1:
        return ids // group_size
    numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
    return np.array([numbers[prompt] for prompt in prompts], np.int64)


def _parts(table: pa.Table, rewards: Sequence[str]) -> dict[str, np.ndarray]:
    """Columns of numbers and truth values that are a reward, or a further column of one, "reward.column"."""
    chosen = [
        field.name
        for field in table.schema
        if field.name.split(".")[0] in rewards and (pa.types.is_primitive(field.type))
    ]
    return {name: table[name].cast(pa.float32()).to_numpy() for name in chosen}
