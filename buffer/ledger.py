"""The ledger: a run's state, the journal that it is the fold of, and the files that it names.

Every change is one pure transition: its records go to the journal (fsynced), then the new state counts, then the answer
is given. Files are written before the record that names them, and removed after the record that says they are not
needed.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar, cast

import pyarrow as pa

from buffer.journal import ALL_EPOCHS, Journal, read_counted
from buffer.orders import Plan
from buffer.state import File, Record, State, Step, fold
from buffer.store import Store
from buffer.transitions import excused
from common.errors import RunStopped, UserError

DELAY_S = 1.0  # that a call takes, and more is nobody's time
Method = TypeVar("Method", bound=Callable[..., Any])


def excusing_delays(method: Method) -> Method:
    """Of a method of who has a `_ledger`. While a disk keeps the buffer waiting, everybody else waits for the buffer,
    and nobody is late by that."""

    @wraps(method)
    def timed(self: Any, *call: Any, **named: Any) -> Any:
        ledger: Ledger = self._ledger
        start = ledger.clock()
        try:
            return method(self, *call, **named)
        finally:
            if (delay := ledger.clock() - start) > DELAY_S:
                ledger.state = excused(ledger.state, delay)

    return cast(Method, timed)


class Ledger:
    """Making it takes the next epoch of the run folder, and goes on from its journal. Calls come one at a time.

    Raises UserError if the journal is of another plan or damaged, and then leaves the folder untouched.
    """

    def __init__(self, run_dir: Path, plan: Plan, clock: Callable[[], float]) -> None:
        self.run_dir = run_dir
        self.clock = clock
        self.notes: list[str] = []  # for people
        self.stopped: str | None = None  # why nothing new may be handed out in this epoch
        self._check_identity(plan, read_counted(run_dir / "journal", before=ALL_EPOCHS)[0])
        self._journal = Journal(run_dir / "journal")
        self.epoch = self._journal.epoch
        self.store = Store(run_dir, self.epoch)
        self.state = State()
        for record in self._journal.history:
            self.state = fold(self.state, record)
        seals = {str(epoch): size for epoch, size in self._journal.seals.items()}
        opened: Record = {"kind": "opened", "epoch": self.epoch, "seals": seals, "plan": plan.identity()}
        opened["time"] = clock()
        self.do(Step(fold(self.state, opened), (opened,)))

    def do(self, step: Step) -> Any:
        """Journal what the step says, then let it be so."""
        if step.records:
            with self.remembering_a_stop():
                self._journal.append(step.records)
        self.state = step.state
        return step.answer

    def write(self, stem: str, table: pa.Table) -> File:
        with self.remembering_a_stop():
            return self.store.write_arrow(stem, table)

    def read(self, file: File) -> pa.Table | None:
        """An acknowledged table; None if it is damaged or gone."""
        with self.remembering_a_stop():
            return self.store.read_arrow(file)

    def remove(self, paths: list[str]) -> None:
        """Remove files, unless a later epoch has begun: it may have sealed the record that made them unneeded out."""
        if paths and self._journal.superseded() is None:
            self.store.remove(paths)

    def note(self, sentence: str) -> None:
        """For people, once."""
        if sentence not in self.notes:
            self.notes.append(sentence)

    def close(self) -> None:
        self._journal.close()

    @contextmanager
    def remembering_a_stop(self) -> Iterator[None]:
        """After a full disk (or a later epoch) nothing new is handed out in this one."""
        try:
            yield
        except RunStopped as stopped:
            self.stopped = str(stopped)
            raise

    def _check_identity(self, plan: Plan, history: list[Record]) -> None:
        theirs = ours = plan.identity()
        for record in history:
            if record["kind"] == "opened":
                theirs = record["plan"]
            elif record["kind"] in ("trained", "restored") and (others := _others(theirs, ours)):
                raise UserError(  # before version 0 nothing is made of a plan
                    f"The run in {self.run_dir} was begun with another plan: {', '.join(others)}; go on with what it "
                    "was begun with, or start another run under another run.name."
                )


def _others(theirs: Record, ours: Record) -> list[str]:
    """What differs, as text: evaluation sets in another order give their trajectories other ids."""
    both = [(name, str(theirs.get(name)), str(ours.get(name))) for name in {**theirs, **ours}]
    return [f"{name} {before} (now {now})" for name, before, now in both if before != now]
