"""How a worker's own exceptions reach the driver."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from common.blame import describe, is_the_workers
from common.errors import RunStopped, UserError

P = ParamSpec("P")
T = TypeVar("T")


class WorkerFailed(Exception):
    """A worker ended by an exception: a sentence, and whether its device or memory is at fault and not its work.

    Judged where it was raised: what caused an exception does not travel from process to process, and some exceptions
    do not travel at all.
    """

    def __init__(self, sentence: str, blameless: bool) -> None:
        super().__init__(sentence, blameless)
        self.sentence = sentence
        self.blameless = blameless


def judged(run: Callable[P, T]) -> Callable[P, T]:
    """For a worker's `run`: what it raises becomes WorkerFailed, but for what ends the whole run."""

    @functools.wraps(run)
    def judging(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return run(*args, **kwargs)
        except (UserError, RunStopped):
            raise
        except Exception as error:
            raise WorkerFailed(describe(error), is_the_workers(error)) from error

    return judging
