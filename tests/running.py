"""Real runs of `launch.py` for tests: each in a process of its own, with its own Ray, ended by id."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
ROOT = Path(__file__).resolve().parent.parent
EXPERIMENT = str(ROOT / "tests" / "small.yaml")  # compressibility, and nothing measured beside it
FAULTS = Path(__file__).resolve().parent / "faults"
TIMEOUT_S = 1800.0  # of anything that is waited for: a machine ten times slower than ours gets there

# A run of a few seconds: 8 trajectories a batch in 4 orders, which are rolled out in twos and learned in sixteens.
# Actors ask for little, so that all fit on two cores.
SMALL = [
    "prompts.list=[a cat,two dogs,a horse on the beach]",
    "sampling.steps=3",
    "sampling.guidance=3",
    "buffer.batch_size=8",
    "buffer.order_size=2",
    "evaluation.count=4",
    "evaluation.grid=4",
    "learner.lr=1e-3",
    "learner.microbatch=16",
    "learner.tracker_min_count=2",
    "samplers.num_cpus=0.2",
    "learner.num_cpus=0.2",
    "rewards.compressibility.num_cpus=0.2",
    "samplers.threads=1",
    "learner.threads=1",
]


def small(model: Path, name: str, *more: str) -> list[str]:
    """The words of a run of that size, of compressibility on `model`."""
    return [EXPERIMENT, *SMALL, f"model.path={model}", f"run.name={name}", *more]


USER_REWARD = """
import numpy as np

class Reward:
    name = "mine"
    def __call__(self, images, prompts):
        {body}
"""


def user_reward(folder: Path, body: str) -> list[str]:
    """Writes a module with that reward into `folder`; the words by which a run is trained on it."""
    (folder / "my_rewards.py").write_text(USER_REWARD.format(body=body))
    return ["rewards.mine.path=my_rewards:Reward", "rewards.mine.num_cpus=0.2", "rewards.compressibility.weight=0"]


@dataclass
class Launched:
    """A `launch.py` that is under way."""

    process: subprocess.Popen[str]
    mark: Path  # written when the fault is reached

    def wait_for_fault(self) -> int:
        """Until the actor under test stands still at its fault; its process id."""
        deadline = time.monotonic() + TIMEOUT_S
        while not (self.mark.exists() and self.mark.read_text()):
            if self.process.poll() is not None:
                raise AssertionError(f"the run ended before its fault: {self.process.communicate()}")
            if time.monotonic() > deadline:
                raise AssertionError("the fault was never reached")
            time.sleep(0.05)
        return int(self.mark.read_text())

    def release(self) -> None:
        """Who stands still at the fault goes on."""
        self.mark.with_name(f"{self.mark.name}.released").touch()

    def wait_for_line(self, start: str) -> None:
        """Until it prints a line that begins so."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(start):
                return
        raise AssertionError(f"the run ended without a line {start}...: {self.process.communicate()}")

    @property
    def session(self) -> Path:
        """The folder of its Ray's session."""
        return self.mark.parent / "ray" / "session_latest"

    def actor(self, kind: str) -> int:
        """The process id of the run's only actor of this class."""
        (found,) = self.actors(kind)
        return found

    def actors(self, kind: str) -> list[int]:
        """The process ids of the run's actors of this class."""
        raylets = processes(self.mark.parent)
        return [pid for pid in processes(f"ray::{kind}") if parent(pid) in raylets]

    def kill(self) -> None:
        """SIGKILL to the driver; Ray ends all else, which is waited for."""
        self.process.kill()
        self.process.wait()


@contextmanager
def launched(
    *arguments: str,
    cwd: Path,
    fault: str = "",
    delays: str = "",
    sick: str = "",
    stillborn: str = "",
    dashboard: bool = False,
) -> Iterator[Launched]:
    """Starts `launch.py` with these arguments. `fault`, `delays`, `sick`, `stillborn`: see faults/sitecustomize.py."""
    temp = Path(tempfile.mkdtemp(prefix="ddpo-"))  # short, because Ray's socket paths must be
    environment = dict(os.environ, PYTHONPATH=str(FAULTS), FAULT=fault, FAULT_MARK=str(temp / "fault"))
    environment |= {"DELAYS": delays, "SICK": sick, "STILLBORN": stillborn}
    ray = [f"ray.temp_dir={temp}/ray", f"ray.dashboard={str(dashboard).lower()}"]
    command = [sys.executable, str(ROOT / "launch.py"), *arguments, *ray]
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env=environment,
        encoding="utf-8",
        errors="backslashreplace",  # a run under another locale may print in its encoding
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        yield Launched(process, temp / "fault")
    finally:
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        wait_for_ray_to_end(temp)
        shutil.rmtree(temp, ignore_errors=True)


def launch(
    *arguments: str, cwd: Path, delays: str = "", sick: str = "", stillborn: str = ""
) -> subprocess.CompletedProcess[str]:
    """Runs `launch.py` to its end."""
    with launched(*arguments, cwd=cwd, delays=delays, sick=sick, stillborn=stillborn) as run:
        output, errors = run.process.communicate(timeout=TIMEOUT_S)
        return subprocess.CompletedProcess(run.process.args, run.process.returncode, output, errors)


def wait_for(what: str, look: Callable[[], T | None], run: Launched | None = None) -> T:
    """What `look` gives as soon as it gives something true; with a `run`, as long as that goes on."""
    deadline = time.monotonic() + TIMEOUT_S
    while not (found := look()):
        assert time.monotonic() < deadline, f"there was never {what}"
        assert run is None or run.process.poll() is None, f"the run ended before there was {what}"
        time.sleep(0.1)
    return found


def wait_for_ray_to_end(temp: Path) -> None:
    """Raises AssertionError, after ending them by id, if processes of the Ray under `temp` stay."""
    deadline = time.monotonic() + TIMEOUT_S
    while left := processes(temp):
        if time.monotonic() > deadline:
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            raise AssertionError(f"processes of a finished run stay: {left}")
        time.sleep(0.2)


def parent(pid: int) -> int:
    """The id of its parent process; 0 once it has ended."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return 0


def processes(text: Path | str) -> list[int]:
    """Ids of processes with `text` on their command line."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and str(text).encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # it ended while we looked
    return found
