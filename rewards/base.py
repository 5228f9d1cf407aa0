"""What a reward is, and the checks between a reward that anyone may have written and a run that must not be spoilt."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch

from common import blame
from common.blame import is_the_workers
from common.errors import UserError
from common.precision import settings_kept
from rewards.columns import cells_of, check_name, in_words, unified

LONGEST_MESSAGE = 200  # characters of a message that is somebody else's, within a sentence of ours


@dataclass(frozen=True)
class Scores:
    """A reward's answer for B pictures.

    Example: Scores(np.array([0.7, 0.2], np.float32), {"caption": ["a cat", "a dog on a bike"]})
    """

    scores: np.ndarray  # float32 [B], higher is better
    columns: Mapping[str, Sequence[Any] | np.ndarray] = field(
        default_factory=dict
    )  # to be stored: B cells each, one kind a column, the same in every answer


class Reward(Protocol):
    """Any object that is called so. Same pictures, same prompts, same shapes: same scores, or runs cannot resume
    bit for bit."""

    def __call__(self, images: np.ndarray, prompts: list[str]) -> np.ndarray | Scores:
        """images: uint8 [B, H, W, 3], read-only; prompts: B of them. Returns numbers [B], or `Scores`."""
        ...


class BadAnswer(ValueError):
    """A reward answered with something that is not B finite numbers; the message names the reward."""


class OtherKind(UserError):
    """A column holds another kind than in an earlier answer. That is no picture's fault, so it ends the run."""


@dataclass(frozen=True)
class NamedReward:
    """A reward under the name that the config gives it; its answers are always checked."""

    name: str  # the key under `rewards:`
    call: Callable[[np.ndarray, list[str]], Any]
    kinds: dict[str, pa.DataType] = field(default_factory=dict)  # of the columns in its answers so far

    def __call__(self, images: np.ndarray, prompts: Sequence[str]) -> Scores:
        """Scores of B pictures. Raises BadAnswer, OtherKind, or whatever the reward itself raises."""
        try:
            with settings_kept():
                answer = self.call(images, list(prompts))
        except (Exception, KeyboardInterrupt):
            raise
        except BaseException as error:  # sys.exit, or one of the user's own: it must not end the process
            exit_code = f"called sys.exit({error.code!r:.100})" if isinstance(error, SystemExit) else ""
            raise RuntimeError(f"it {exit_code or f'raised {describe(error)}'}") from error
        scores = checked(self.name, answer, len(prompts))
        self._remember(scores.columns)
        return scores

    def _remember(self, columns: Mapping[str, Any]) -> None:
        for key, cells in columns.items():
            kind = pa.array(cells).type
            known = next((known for known in self.kinds if known.lower() == key.lower()), key)
            if known != key:
                raise OtherKind(
                    f"Reward {self.name} names a column {key!r} that it named {known!r} before, and some readers take "
                    "no notice of case; always give it one name, and start again."
                )
            old = self.kinds.get(key, kind)
            try:
                self.kinds[key] = unified(old, kind)
            except pa.ArrowTypeError as error:
                raise OtherKind(
                    f"Reward {self.name} put {in_words(kind)} into column {key!r}, where it put {in_words(old)} "
                    "before; store one kind in it, whatever the picture, and start again."
                ) from error


def checked(name: str, answer: Any, count: int) -> Scores:
    """The answer of reward `name` for `count` pictures as Scores: float32 [count], finite, columns of that length in
    plain Python.

    Raises BadAnswer otherwise.
    """
    columns = answer.columns if isinstance(answer, Scores) else {}
    raw = answer.scores if isinstance(answer, Scores) else answer
    try:
        numbers = _numbers(raw)
    except (TypeError, ValueError, RuntimeError) as error:  # a ragged list; a tensor that requires grad or is on a GPU
        raise BadAnswer(f"Reward {name} gave no array of numbers ({describe(error)}); return float32 [B].") from error
    if not (numbers.dtype.kind in "fiub" or np.can_cast(numbers.dtype, np.float64)):
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
    return Scores(scores, _checked_columns(name, columns, count))


def _numbers(raw: Any) -> np.ndarray:
    if isinstance(raw, torch.Tensor) and raw.is_floating_point():
        raw = raw.double()  # NumPy has no bfloat16 and no float8
    if isinstance(raw, list | tuple) and all(isinstance(score, torch.Tensor) for score in raw):
        raw = [score.tolist() for score in raw]
    if isinstance(raw, np.ma.MaskedArray):
        raw = np.ma.filled(raw.astype(np.float64), np.nan)  # what is masked is no score
    return np.asarray(raw)


def _checked_columns(name: str, columns: Any, count: int) -> dict[str, list[Any]]:
    if not isinstance(columns, Mapping):
        raise BadAnswer(f"Reward {name} gave {type(columns).__name__} as columns; give a dict of name and cells.")
    cells: dict[str, list[Any]] = {}
    try:
        for key, values in columns.items():
            check_name(key)
            twin = next((other for other in cells if other.lower() == key.lower()), None)
            if twin is not None:
                raise ValueError(f"names two columns {twin!r} and {key!r}, which some readers take for one; rename one")
            cells[key] = cells_of(key, values, count)
    except ValueError as error:
        raise BadAnswer(f"Reward {name} {error}.") from error
    return cells


def try_out(reward: NamedReward, prompts: Sequence[str], image_size: tuple[int, int]) -> None:
    """Asks `reward` about two pictures before the first rollout, so that a mistake costs seconds.

    prompts: one or more of the run's; image_size: (height, width) of the run's pictures. Raises UserError. A reward may
    have a method `check_trial(prompts, scores)`: it hears all prompts and its answer about the two pictures, and raises
    UserError where the run would be spoilt.
    """
    height, width = image_size
    smooth = np.linspace(0, 255, height * width * 3).reshape(height, width, 3)
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3))
    images = np.stack([smooth, noise]).astype(np.uint8)
    images.flags.writeable = False  # as in the run, where pictures are views of shared memory
    pair = [prompts[0], prompts[-1]]
    try:
        scores = reward(images, pair)
        if hasattr(reward.call, "check_trial"):
            reward.call.check_trial(prompts, scores)
    except BadAnswer as error:
        raise UserError(f"{error} (Tried on two pictures before the first rollout.)") from error
    except UserError:
        raise
    except Exception as error:
        if is_the_workers(error):
            raise the_machines(reward.name, error) from error
        raise UserError(
            f"Reward {reward.name} failed on two pictures, uint8 [2, {height}, {width}, 3], before the first rollout: "
            f"{describe(error)}; mend it and start again."
        ) from error


def the_machines(name: str, error: BaseException) -> UserError:
    """What to say where a device or memory fails while reward `name` is made or tried."""
    return UserError(
        f"Reward {name} ran out of memory, or its device failed, before the first rollout: {describe(error)}; take a "
        f"smaller model, or see to the machine (rewards.{name}.num_gpus reserves a GPU for it), and start again."
    )


def slices(count: int, batch_size: int) -> list[range]:
    """The rows of each call of a reward for an order of `count` pictures: always the same, so are the scores."""
    return [range(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]


def score_order(
    reward: NamedReward, images: np.ndarray, prompts: Sequence[str], batch_size: int
) -> tuple[Scores, dict[int, str]]:
    """Scores of an order's pictures, and of those that have none the reason.

    images: uint8 [B, H, W, 3]; prompts: B. The reward is asked in fixed slices of `batch_size` (the last may be
    shorter), so that the same order is always scored in the same shapes. Where a slice fails, by an exception or a
    number that is not finite, its pictures are tried alone: so the failure is that of a picture, and its neighbours
    keep their scores (rules 6 and 7 of docs/buffer.md).

    Returns Scores of the rows that are not in the dict {row: reason}, in the order of rows. Raises what is no
    picture's fault: an error of the device or of memory, and UserError.
    """
    pieces: list[Scores] = []
    failed: dict[int, str] = {}
    for rows in slices(len(prompts), batch_size):
        try:
            pieces.append(reward(images[rows.start : rows.stop], prompts[rows.start : rows.stop]))
        except Exception as error:  # noqa: BLE001  (not swallowed, see below)
            _raise_if_no_pictures_fault(error)  # else it comes again, alone, from the picture that causes it
            alone, reasons = score_rows(reward, images, prompts, rows, batch_size)
            pieces.append(alone)
            failed |= reasons
    return _concatenated(pieces), failed


def score_rows(
    reward: NamedReward, images: np.ndarray, prompts: Sequence[str], rows: Iterable[int], batch_size: int
) -> tuple[Scores, dict[int, str]]:
    """As `score_order`, of these rows only, each alone and repeated to the shape of the slice that it belongs to."""
    shape = {row: len(piece) for piece in slices(len(prompts), batch_size) for row in piece}
    pieces: list[Scores] = []
    failed: dict[int, str] = {}
    for row in rows:
        try:
            alone = reward(np.repeat(images[row : row + 1], shape[row], axis=0), [prompts[row]] * shape[row])
        except Exception as error:  # noqa: BLE001  (not swallowed, see below)
            _raise_if_no_pictures_fault(error)
            failed[row] = describe(error)  # counted against the picture, with its reason, by the buffer
        else:
            pieces.append(Scores(alone.scores[:1], {key: cells[:1] for key, cells in alone.columns.items()}))
    return _concatenated(pieces), failed


def _raise_if_no_pictures_fault(error: Exception) -> None:
    if is_the_workers(error) or isinstance(error, UserError):
        raise error


def _concatenated(pieces: Sequence[Scores]) -> Scores:
    """One Scores after another; a column that one of them lacks is None there."""
    keys = dict.fromkeys(key for piece in pieces for key in piece.columns)
    columns = {
        key: [cell for piece in pieces for cell in piece.columns.get(key, [None] * len(piece.scores))] for key in keys
    }
    return Scores(np.concatenate([np.empty(0, np.float32), *(piece.scores for piece in pieces)]), columns)


def describe(error: BaseException) -> str:
    """An exception in one line."""
    return str(error) if isinstance(error, BadAnswer) else blame.describe(error, LONGEST_MESSAGE)
