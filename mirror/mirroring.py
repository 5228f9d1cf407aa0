"""Mirroring while the run goes on: a thread of the driver's process, which waits for nobody and which nobody waits for.

A thread, because copying is waiting: for the network and the disk, in calls that leave the interpreter to others. An
actor would need a place, a life of its own and a word with the buffer; this needs the run folder, which lies where the
driver runs, and dies with the driver, whose next start claims the mirror anew.
"""

import threading
import time
from collections.abc import Callable
from types import TracebackType

from buffer.state import State
from common.errors import RunStopped
from mirror.mirror import Mirror
from mirror.remote import ERRORS, first_line

FIRST_DELAY_S, LONGEST_DELAY_S = 1.0, 60.0
PATIENCE_S = 300.0  # at the end of a run, since the last file that was copied
CLOSING_S = 5.0  # for the call that the thread is in


class Mirroring:
    """The mirror of a run under way, or none: then all of it does nothing. A context manager: it ends the thread.

    served: `Rules.served` of the run.
    """

    def __init__(self, mirror: Mirror | None, served: Callable[[State], set[int]]) -> None:
        self.mirror = mirror
        self.served = served
        self.notes: list[str] = []  # what failed, and that it is over, in sentences
        self.failures = 0  # in all
        self._told = (0, 0)  # batches trained and evaluations finished, as the driver hears
        self._mirrored = 0  # batches in the HEAD
        self._wanted = self._done = 0  # requests
        self._trouble = ""  # of the last attempt
        self._error: Exception | None = None  # that ended the thread
        self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="mirroring", daemon=True)

    def __enter__(self) -> "Mirroring":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(CLOSING_S)

    def start(self) -> None:
        """Claim the mirror, and begin. Raises UserError if another head has gone on with the run."""
        if self.mirror is not None:
            self.mirror.claim()
            self._thread.start()

    def follow(self, trained: int, evaluated: int) -> None:
        """So many batches are journaled as trained, and so many evaluations as finished. Does not wait.

        Raises RunStopped if another head has gone on with the run.
        """
        if self.mirror is not None and (trained, evaluated) != self._told:
            self._told = (trained, evaluated)
            self._want()
        self._raise()

    @property
    def behind(self) -> int | None:
        """Trained batches that the mirror does not have yet; None without a mirror."""
        return None if self.mirror is None else max(0, self._told[0] - self._mirrored)

    def finish(self, patience_s: float = PATIENCE_S) -> None:
        """Wait until the mirror has all of the run folder. Raises RunStopped if nothing could be copied for so long."""
        if self.mirror is None:
            return
        self._want()
        copies, since = self.mirror.copies, time.monotonic()
        with self._changed:
            while self._done < self._wanted and self._error is None:
                if self.mirror.copies > copies:
                    copies, since = self.mirror.copies, time.monotonic()
                if time.monotonic() - since > patience_s:
                    raise RunStopped(
                        f"The mirror {self.mirror.uri} is not complete: nothing could be copied for {patience_s:.0f} s "
                        f"({self._trouble or 'it does not answer'}). {self.mirror.run_dir} has all of the run; mend "
                        "the mirror and give the same command again, which completes it."
                    )
                self._changed.wait(0.2)
        self._raise()

    def _want(self) -> None:
        with self._changed:
            self._wanted += 1
            self._changed.notify_all()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        assert self.mirror is not None
        delay = FIRST_DELAY_S
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._done < self._wanted or self._closing)
                wanted = self._wanted
            if self._closing:
                return
            try:
                self._mirrored = self.mirror.sync(self.served)
            except ERRORS as error:
                self._failed(first_line(error), delay)
                with self._changed:
                    self._changed.wait_for(lambda: self._closing, delay)
                delay = min(2 * delay, LONGEST_DELAY_S)
            except Exception as error:  # noqa: BLE001  (the driver raises it: another head has gone on, or worse)
                with self._changed:
                    self._error = error
                    self._changed.notify_all()
                return
            else:
                if self._trouble:
                    self.notes.append(f"the mirror is up to date again, after {self.failures} failures in all")
                self._trouble, delay = "", FIRST_DELAY_S
                with self._changed:
                    self._done = wanted
                    self._changed.notify_all()

    def _failed(self, trouble: str, delay: float) -> None:
        self.failures += 1
        if trouble != self._trouble:
            self.notes.append(
                f"the mirror failed ({trouble}), {self.behind} batches behind; tried again in {delay:.0f} s"
            )
        self._trouble = trouble
