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

    Decided where the exception was raised: its cause is not sent to other processes, and some exceptions cannot be sent
    at all.
    """

    def __init__(self, sentence: str, blameless: bool) -> None:
        super().__init__(sentence, blameless)
        self.sentence = sentence
        self.blameless = blameless


def judged(run: Callable[P, T]) -> Callable[P, T]:
    """Decorates a worker's `run`: its exceptions become WorkerFailed, except those that end the whole run."""

    @functools.wraps(run)
    def judging(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return run(*args, **kwargs)
        except (UserError, RunStopped):
            raise
        except Exception as error:
            raise WorkerFailed(describe(error), is_the_workers(error)) from error

    return judging
