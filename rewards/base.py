"""What a reward is, and the checks between a reward that anyone may have written and a run that must not be spoilt."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from conf.errors import UserError

RESERVED = ("score", "trajectory_id")  # columns of the score tables that are not the reward's to name
CELLS = (str, bool, int, float)  # what a cell of a further column may hold, besides None and lists of it


@dataclass(frozen=True)
class Scores:
    """A reward's answer for B pictures.

    Example: Scores(np.array([0.7, 0.2], np.float32), {"caption": ["a cat", "a dog on a bike"]})
    """

    scores: np.ndarray  # float32 [B], higher is better
    columns: Mapping[str, Sequence[Any] | np.ndarray] = field(
        default_factory=dict
    )  # to be stored: B cells each, one type a column


class Reward(Protocol):
    """Any object that is called so. Same pictures, same prompts, same shapes: same scores, or runs cannot resume
    bit for bit."""

    def __call__(self, images: np.ndarray, prompts: list[str]) -> np.ndarray | Scores:
        """images: uint8 [B, H, W, 3], read-only; prompts: B of them. Returns numbers [B], or `Scores`."""
        ...


class BadAnswer(ValueError):
    """A reward answered with something that is not B finite numbers; the message names the reward."""


@dataclass(frozen=True)
class NamedReward:
    """A reward under the name that the config gives it; its answers are always checked."""

    name: str  # the key under `rewards:`
    call: Callable[[np.ndarray, list[str]], Any]

    def __call__(self, images: np.ndarray, prompts: Sequence[str]) -> Scores:
        """Scores of B pictures. Raises BadAnswer, or whatever the reward itself raises."""
        return checked(self.name, self.call(images, list(prompts)), len(prompts))


def checked(name: str, answer: Any, count: int) -> Scores:
    """The answer of reward `name` for `count` pictures as Scores: float32 [count], finite, columns of that length.

    Raises BadAnswer otherwise.
    """
    columns = answer.columns if isinstance(answer, Scores) else {}
    raw = answer.scores if isinstance(answer, Scores) else answer
    try:
        numbers = np.asarray(raw)
        kind = numbers.dtype.kind
    except (TypeError, ValueError, RuntimeError) as error:  # a ragged list; a tensor that requires grad or is on a GPU
        raise BadAnswer(f"Reward {name} gave no array of numbers ({error}); return float32 [B].") from error
    if kind not in "fiub":
        raise BadAnswer(
            f"Reward {name} gave {type(raw).__name__} of dtype {numbers.dtype}; return float32 [B], or Scores."
        )
    if numbers.shape != (count,):
        raise BadAnswer(
            f"Reward {name} gave scores of shape {list(numbers.shape)} for {count} pictures; return one number a "
            f"picture, shape [{count}]."
        )
    with np.errstate(over="ignore"):
        scores = numbers.astype(np.float32)
    if not np.isfinite(scores).all():
        row = int(np.flatnonzero(~np.isfinite(scores))[0])
        raise BadAnswer(f"Reward {name} gave {numbers[row]} for picture {row} of {count}; scores must be finite.")
    return Scores(scores, {key: _checked_column(name, key, values, count) for key, values in columns.items()})


def _checked_column(name: str, key: Any, values: Any, count: int) -> list[Any]:
    if not isinstance(key, str) or not key or key in RESERVED:
        raise BadAnswer(f"Reward {name} names a column {key!r}; choose a text other than {' and '.join(RESERVED)}.")
    cells = values.tolist() if isinstance(values, np.ndarray) else list(values)
    cells = [cell.item() if isinstance(cell, np.generic) else cell for cell in cells]
    if len(cells) != count:
        raise BadAnswer(f"Reward {name} gave {len(cells)} cells in column {key!r} for {count} pictures; give {count}.")
    flat = [value for cell in cells for value in (cell if isinstance(cell, list) else [cell])]
    kinds = {type(value) for value in flat if value is not None}
    if not (kinds <= {int, float} or any(kinds == {kind} for kind in CELLS)):
        found = " and ".join(sorted(kind.__name__ for kind in kinds))
        raise BadAnswer(
            f"Reward {name} put {found} into column {key!r}; store text, numbers or truth values, or lists of them, "
            "one kind a column."
        )
    return cells


def try_out(reward: NamedReward, prompts: Sequence[str], image_size: tuple[int, int]) -> None:
    """Asks `reward` about two pictures before the first rollout, so that a mistake costs seconds.

    prompts: one or more of the run's; image_size: (height, width) of the run's pictures. Raises UserError.
    """
    height, width = image_size
    smooth = np.linspace(0, 255, height * width * 3).reshape(height, width, 3)
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3))
    images = np.stack([smooth, noise]).astype(np.uint8)
    images.flags.writeable = False  # as in the run, where pictures are views of shared memory
    pair = [prompts[0], prompts[-1]]
    try:
        reward(images, pair)
    except BadAnswer as error:
        raise UserError(f"{error} (Tried on two pictures before the first rollout.)") from error
    except Exception as error:
        raise UserError(
            f"Reward {reward.name} failed on two pictures, uint8 [2, {height}, {width}, 3], before the first rollout: "
            f"{describe(error)}; mend it and start again."
        ) from error


def score_order(
    reward: NamedReward, images: np.ndarray, prompts: Sequence[str], batch_size: int
) -> tuple[Scores, dict[int, str]]:
    """Scores of an order's pictures, and of those that have none the reason.

    images: uint8 [B, H, W, 3]; prompts: B. The reward is asked in fixed slices of `batch_size` (the last may be
    shorter), so that the same order is always scored in the same shapes. Where a slice fails, by an exception or a
    number that is not finite, its pictures are tried alone, each repeated to the slice's shape: so the failure is
    that of a picture, and its neighbours keep their scores (PROTOCOL.md 6 and 7).

    Returns Scores of the rows that are not in the dict {row: reason}, in the order of rows.
    """
    pieces: list[Scores] = []
    failed: dict[int, str] = {}
    for start in range(0, len(prompts), batch_size):
        rows = range(start, min(start + batch_size, len(prompts)))
        try:
            pieces.append(reward(images[start : rows.stop], prompts[start : rows.stop]))
            continue
        except Exception:  # noqa: BLE001  (not swallowed: it comes again, alone, from the picture that causes it)
            pass
        for row in rows:
            try:
                alone = reward(np.repeat(images[row : row + 1], len(rows), axis=0), [prompts[row]] * len(rows))
            except Exception as error:  # noqa: BLE001  (counted against the picture, with its reason, by the buffer)
                failed[row] = describe(error)
            else:
                first = {key: cells[:1] for key, cells in alone.columns.items()}
                pieces.append(Scores(alone.scores[:1], first))
    return _concatenated(pieces), failed


def _concatenated(pieces: Sequence[Scores]) -> Scores:
    """One Scores after another; a column that one of them lacks is None there."""
    keys = dict.fromkeys(key for piece in pieces for key in piece.columns)
    columns = {
        key: [cell for piece in pieces for cell in piece.columns.get(key, [None] * len(piece.scores))] for key in keys
    }
    return Scores(np.concatenate([np.empty(0, np.float32), *(piece.scores for piece in pieces)]), columns)


def describe(error: BaseException) -> str:
    """An exception in one line."""
    if isinstance(error, BadAnswer):
        return str(error)
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
