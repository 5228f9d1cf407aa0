"""One blow: who is struck, by which signal, and when. All of it follows from a seed and the case's number."""

import json
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from subprocess import Popen

from buffer.journal import file_name
from buffer.run_folder import RunFolder
from buffer.state import Record
from tests.chaos.ray_cluster import RayCluster
from tests.running import TIMEOUT_S

# A role and how its actor's name begins; the driver is no actor.
ROLES = {
    "sampler": "sampler-0.",
    "reward": "reward-compressibility-0.",
    "buffer": "buffer",
    "learner rank 0": "learner-0.",
    "learner rank 1": "learner-1.",
    "driver": "",
}
SIGNALS = (signal.SIGKILL, signal.SIGTERM)
CELLS = list(product(ROLES, SIGNALS))
BATCHES = 3
ORDERS = BATCHES * 4 + 2 * 2  # of the batches, and of the evaluations of the first and the last version

# Steps of a role's work that random moments rarely meet: function (see faults/sitecustomize.py) and how often it is
# called in a run. Ranks of the learner stand still together, so either may be struck where one of them does.
LEARNER = [
    ("learner.update:Updater._optimizer_step", 2 * BATCHES),  # in the middle of a batch
    ("learner.recovery:write", 1 + BATCHES),  # trained, and nothing of it written
    ("buffer.store:write_batch", BATCHES),  # the recovery point written, the rows not
]
STEPS = {
    "sampler": [("policy.rollout:rollout", ORDERS), ("buffer.schema:rollout_table", ORDERS)],
    "reward": [("rewards.base:score_order", ORDERS), ("workers.scorer:_table", ORDERS)],
    "buffer": [
        (
            "buffer.store:Store.write_arrow",
            3 * ORDERS - 4,
        ),  # handed in, not on disk: path (not of the 4 evaluating), pictures, scores
        ("buffer.journal:Journal.append", 3 * ORDERS),  # on disk, not journaled
        ("buffer.transitions:trained", BATCHES),
    ],
    "learner rank 0": LEARNER,
    "learner rank 1": LEARNER,
    "driver": [("workers.publisher:Publisher._publish", BATCHES), ("monitoring.metrics:MetricsLog.add_batch", BATCHES)],
}
STEP_ROUNDS = (3, 4)  # of every five blows at a role by a signal, these fall at a step, the others at any moment


@dataclass(frozen=True)
class Case:
    number: int
    role: str
    signal: signal.Signals
    max_staleness: int
    step: str | None  # module:function:n, the n-th call of a function of that role; or
    share: float | None  # of the time from the run's first claim to its last trained batch

    def __str__(self) -> str:
        when = self.step or f"at {self.share:.0%}"
        return f"{self.number:3d}  {self.role} {self.signal.name} max_staleness={self.max_staleness} {when}"


def draw(seed: int, number: int) -> Case:
    """Case `number` (0, 1, 2, ...): round by round through all roles and signals, half of each round asynchronous."""
    turn, place = divmod(number, len(CELLS))
    role, blow = CELLS[place]
    dice = random.Random(f"{seed} {number}")
    step = share = None
    # A driver that stands still does not hear SIGTERM, by which it only notes that it shall end.
    if turn % 5 in STEP_ROUNDS and (role, blow) != ("driver", signal.SIGTERM):
        first = random.Random(f"{seed} {role} {blow}").randrange(len(STEPS[role]))
        function, calls = STEPS[role][(first + turn) % len(STEPS[role])]  # not the same twice in a row
        step = f"{function}:{dice.randint(1, calls)}"
    else:
        share = dice.random()
    return Case(number, role, blow, 2 * ((turn + place // 2 + place) % 2), step, share)


@dataclass(frozen=True)
class Timeline:
    """When each line came into the journal of an undisturbed run, by which random moments are found again in another
    one, on a busier machine, too: so many lines, and so many seconds after the last of them."""

    times: list[float]
    first: float  # claim
    last: float  # trained batch

    def moment(self, share: float) -> tuple[int, float]:
        moment = self.first + share * (self.last - self.first)
        lines = sum(time <= moment for time in self.times)
        return lines, moment - self.times[lines - 1]


def timeline(run_dir: Path) -> Timeline:
    """Of a run of one epoch."""
    times: list[float] = []
    first = last = 0.0
    for line in (run_dir / "journal" / file_name(1)).read_text().splitlines():
        records = json.loads(line)["records"]
        times.append(max([record["time"] for record in records if "time" in record], default=times[-1] if times else 0))
        kinds = {record["kind"] for record in records}
        first = first or (times[-1] if "claimed" in kinds else 0.0)
        last = times[-1] if "trained" in kinds else last
    return Timeline(times, first, last)


@dataclass(frozen=True)
class Blow:
    pid: int
    before: list[Record]  # the journal when it fell


def strike(case: Case, cluster: RayCluster, process: Popen[str], run_dir: Path, line: Timeline) -> Blow | None:
    """Waits for the case's moment in the run of `process` and strikes. None if the run ended before, or hangs."""

    def victim() -> int | None:
        if case.role == "driver":
            return process.pid
        return next((pid for name, pid in cluster.actors().items() if name.startswith(ROLES[case.role])), None)

    if case.share is None:
        _wait_until(cluster.mark.exists, process)
    else:
        journal_file = run_dir / "journal" / file_name(1)
        lines, later = line.moment(case.share)
        _wait_until(lambda: _lines(journal_file) >= lines, process)
        moment = time.monotonic() + later
        # A run that is quicker than the undisturbed one was is at that moment when the next line comes.
        _wait_until(lambda: time.monotonic() >= moment or _lines(journal_file) > lines, process)
    _wait_until(lambda: victim() is not None, process)
    pid = victim()
    if pid is None or process.poll() is not None:
        return None
    before = RunFolder(run_dir).history
    os.kill(pid, case.signal)
    if case.signal == signal.SIGTERM and case.step is not None and cluster.mark.read_text() != str(pid):
        # Another rank stands still. A rank that waits for it in a collective call hears SIGTERM only after that.
        cluster.released.touch()
    return Blow(pid, before)


def _wait_until(condition: Callable[[], bool], process: Popen[str]) -> None:
    """Or until the process has ended, or the time of a run is up."""
    deadline = time.monotonic() + TIMEOUT_S
    while process.poll() is None and time.monotonic() < deadline and not condition():
        time.sleep(0.02)


def _lines(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0
