"""The cells of a study: runs of workers/local.py, each in a process of its own, several at once.

Each has one thread, so its numbers do not depend on what runs beside it; cells may be made on several machines of one
kind and copied together. A study that was interrupted goes on: a cell that is over is not begun again, and one that was
under way goes on from its last batch.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from buffer.run_folder import RunFolder
from common.commands import at_least_1, command, path_of
from common.errors import RunStopped, UserError, shown
from conf.load import from_file, load
from conf.resume import MOST_SHOWN, changed_settings
from evaluation import history

ROOT = Path(__file__).resolve().parent.parent
# Where an experiment has groups: a prompt for each picture, which is compared with the last ones of its prompt.
ALONE = (
    "buffer.group_size=1",
    "sampling.same_noise=false",
    "learner.advantage=per_prompt",
    "learner.tracker_min_count=2",
)
# As the paper has it: also all pictures are trained on, and there is no penalty on the KL.
PLAIN = (*ALONE, "learner.train_share=1", "learner.kl_weight=0")
ONE_THREAD = ("learner.threads=1", "samplers.threads=1")


@dataclass(frozen=True)
class Cell:
    """A run of a study."""

    name: str  # of its folder
    words: tuple[str, ...]  # of its command line: an experiment, and what is other here

    def command(self, folder: Path) -> list[str]:
        return [*self.words, *ONE_THREAD, f"run.dir={folder}", f"run.name={self.name}"]


def is_over(cell: Cell, folder: Path) -> bool:
    """Whether the run is finished, or was stopped by its guard. Raises UserError if other settings made it."""
    run = RunFolder(folder / cell.name)
    if not (run.path / "config.yaml").exists():
        return False
    config = load(cell.command(folder))
    if changed := changed_settings(from_file(run.path / "config.yaml"), config):
        raise UserError(
            f"{shown(run.path)} was made with other settings ({'; '.join(changed[:MOST_SHOWN])}): remove it, or name "
            "another folder by --runs"
        )
    return bool(history.is_over(run, config))


def make(cells: Sequence[Cell], folder: Path, at_once: int | None = None) -> None:
    """Makes all cells that are not over, and says when each is. at_once: by default as many as there are cores.

    Raises RunStopped, once those that had begun are over, if one cannot go on, and before any begins UserError if one
    was made with other settings.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--runs={shown(folder)} cannot be a folder ({error.strerror}): name another") from error
    left = [cell for cell in cells if not is_over(cell, folder)]
    print(f"{len(left)} of {len(cells)} runs to make in {folder}", flush=True)
    with ThreadPoolExecutor(at_once or len(os.sched_getaffinity(0))) as pool:
        for done in as_completed([pool.submit(_run, cell, folder) for cell in left]):
            try:
                print(done.result(), flush=True)
            except RunStopped:
                pool.shutdown(cancel_futures=True)
                raise


def _run(cell: Cell, folder: Path) -> str:
    start = time.monotonic()
    command = [sys.executable, "-m", "workers.local", *cell.command(folder.resolve())]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, encoding="utf-8", check=False)
    if done.returncode:
        raise RunStopped(f"the run {cell.name} of the study ended: {done.stderr.strip()[-500:]}")
    return f"{cell.name}: {time.monotonic() - start:.0f} s"


def study(parser: argparse.ArgumentParser, arguments: Sequence[str], work: Callable[[argparse.Namespace], str]) -> int:
    """The command of a study: prints what `work` gives, or why it cannot be. Gives the exit code.

    parser: its `prog` names the study, and its runs lie in a folder of that name; --runs and --at-once are added here.
    """
    folder = Path("runs") / parser.prog.rpartition(".")[2]
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--runs", type=path_of, default=folder, help="where the study's runs lie")
    parser.add_argument("--at-once", type=at_least_1, help="runs at a time; by default as many as there are cores")

    @command(parser.prog, interrupted="stopped; the same command goes on")
    def main(arguments: Sequence[str]) -> None:
        print(work(parser.parse_args(arguments)))

    return main(arguments)
