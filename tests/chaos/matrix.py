"""The kill matrix: small real runs, in each of which one process dies, and the verdict on what they leave.

    make test-chaos                                   five rounds through all roles and signals
    CHAOS_RUNS=1000 make test-chaos                   more of them
    CHAOS_SEED=7 CHAOS_CASE=23 make test-chaos        one case again (or several: CHAOS_CASE=23,40)
    CHAOS_AT_ONCE=1 make test-chaos                   one run at a time; by default as many as there are cores

{sampler, reward, buffer, learner rank 0, learner rank 1, driver} x {SIGKILL, SIGTERM}, half of the runs with
buffer.max_staleness 0 and half with 2, each at a moment drawn from the seed that is printed. Runs that are made one
after another share a Ray cluster; a driver that dies is started again by the same command, which is all that has to be
done.
"""

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing import Queue, get_context
from pathlib import Path
from queue import Empty
from signal import SIG_IGN, SIGKILL, SIGTERM, signal

from tests.chaos.blow import BATCHES, CELLS, ROLES, SIGNALS, Case, Timeline, draw, strike, timeline
from tests.chaos.ray_cluster import RayCluster, ray_cluster
from tests.chaos.verdict import verdict
from tests.pipelines import tiny_pipeline
from tests.running import EXPERIMENT, FAULTS, ROOT, SMALL, TIMEOUT_S

Cell = tuple[str, int, int]  # role, signal, max_staleness


@dataclass(frozen=True)
class Matrix:
    """What all runs share."""

    cluster: RayCluster
    model: Path
    runs: Path
    undisturbed: dict[int, Path]  # run folder by max_staleness
    timelines: dict[int, Timeline]

    def command(self, name: str, max_staleness: int) -> list[str]:
        settings = {
            "model.path": self.model,
            "run.name": name,
            "run.dir": self.runs,
            "run.batches": BATCHES,
            "ray.address": self.cluster.address,
            "learner.count": 2,
            "buffer.max_staleness": max_staleness,
            "buffer.keep_batches": BATCHES,  # for the verdict, which compares tables and scores
            "evaluation.every": BATCHES,
        }
        words = [f"{key}={value}" for key, value in settings.items()]
        return [sys.executable, str(ROOT / "launch.py"), EXPERIMENT, *SMALL, *words]

    def start(self, command: list[str], fault: str = "") -> subprocess.Popen[str]:
        """`fault`: of the driver; actors have the cluster's."""
        faults = {"PYTHONPATH": str(FAULTS), "FAULT": fault, "FAULT_MARK": str(self.cluster.mark)}
        return subprocess.Popen(
            command,
            cwd=self.runs,
            env=self.cluster.environment | faults,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    def perform(self, case: Case) -> list[str] | None:
        """What is wrong after this case, in sentences. None if the run was over before the blow could fall."""
        name = f"case{case.number}"
        run_dir = self.runs / name
        shutil.rmtree(run_dir, ignore_errors=True)
        self.cluster.mark.unlink(missing_ok=True)
        self.cluster.released.unlink(missing_ok=True)
        of_driver = case.role == "driver"
        self.cluster.fault.write_text("" if of_driver else case.step or "")
        command = self.command(name, case.max_staleness)
        process = self.start(command, (case.step or "") if of_driver else "")
        try:
            blow = strike(case, self.cluster, process, run_dir, self.timelines[case.max_staleness])
            found = ended(process, case, last=not of_driver)
            if blow is not None and of_driver and not found:
                process = self.start(command)
                found = ended(process, case, last=True)
        finally:
            process.kill()
            process.communicate()
            self.cluster.fault.write_text("")
        found += self.leftovers()
        if blow is None and not found:
            return None
        whole = self.undisturbed[0] if case.max_staleness == 0 else None
        return found or verdict(run_dir, blow.before if blow else [], whole)

    def leftovers(self) -> list[str]:
        """Processes of a run that has ended; they are ended here, by id, so that the next run is alone."""
        deadline = time.monotonic() + TIMEOUT_S
        while left := self.cluster.busy():
            if time.monotonic() > deadline:
                named = self.cluster.actors()
                for pid in left:
                    os.kill(pid, SIGKILL)
                return [f"processes stay {TIMEOUT_S:.0f} s after the run: {left}, of which actors are {named}"]
            time.sleep(0.2)
        return []


def ended(process: subprocess.Popen[str], case: Case, last: bool) -> list[str]:
    """What is wrong with how a `launch.py` ended. last: it has to finish the run; else it was struck itself."""
    try:
        output, errors = process.communicate(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        output, errors = process.communicate()
        return [f"the run did not end in {TIMEOUT_S:.0f} s\n{output}\n{errors}"]
    wanted = -SIGKILL if not last and case.signal == SIGKILL else 0
    finished = "finished" in output or not last
    if process.returncode != wanted or not finished or "Traceback" in output + errors:
        return [f"launch.py ended with {process.returncode}, not {wanted} and a finished run\n{output}\n{errors}"]
    return []


def prepare(cluster: RayCluster, folder: Path) -> Matrix:
    """The runs that nobody disturbs, one for each max_staleness."""
    matrix = Matrix(cluster, tiny_pipeline(folder / "model"), folder / "runs", {}, {})
    matrix.runs.mkdir()
    for max_staleness in (0, 2):
        name = f"undisturbed{max_staleness}"
        process = matrix.start(matrix.command(name, max_staleness))
        try:
            output, errors = process.communicate(timeout=TIMEOUT_S)
        finally:
            process.kill()
        assert process.returncode == 0, (output, errors)
        matrix.undisturbed[max_staleness] = matrix.runs / name
        matrix.timelines[max_staleness] = timeline(matrix.runs / name)
        wrong = matrix.leftovers() + verdict(matrix.runs / name, [])
        assert not wrong, wrong
    return matrix


def table(done: Counter[Cell], failed: Counter[Cell]) -> str:
    """Runs that went well, of all, by role, signal and max_staleness."""
    columns = [(blow, max_staleness) for blow in SIGNALS for max_staleness in (0, 2)]
    lines = [" " * 16 + "".join(f"{blow.name} k={k}".rjust(14) for blow, k in columns)]
    for role in ROLES:
        cells = [(role, blow, k) for blow, k in columns]
        shown = [f"{done[c] - failed[c]}/{done[c]}{' FAILED' if failed[c] else ''}" for c in cells]
        lines.append(role.ljust(16) + "".join(text.rjust(14) for text in shown))
    return "\n".join(lines)


def judged(matrix: Matrix, seed: int, number: int) -> tuple[Cell, bool]:
    """Whether a case went well; what is wrong is printed."""
    one, start = draw(seed, number), time.monotonic()
    found = matrix.perform(one)
    while found is None and one.share is not None and one.share > 0.05:
        one = replace(one, share=0.8 * one.share)  # the run was quicker than we, so a bit earlier
        found = matrix.perform(one)
    folder = matrix.runs / f"case{number}"
    lines = [f"{one}  {'ok' if found == [] else 'FAILED'}  {time.monotonic() - start:.0f} s"]
    if found == []:
        shutil.rmtree(folder)
    else:
        lines += [f"     {sentence}" for sentence in found or ["the run was over before the blow could fall"]]
        lines += [
            f"     run folder: {folder}",
            f"     once more: CHAOS_SEED={seed} CHAOS_CASE={number} make test-chaos",
        ]
    print("\n".join(lines), flush=True)
    return (one.role, int(one.signal), one.max_staleness), found == []


def stop(*_: object) -> None:
    """By way of all that ends what was started here; that takes a while, and a second signal does not break it off."""
    signal(SIGTERM, SIG_IGN)
    sys.exit(1)


def part(seed: int, numbers: "Queue[int | None]", results: "Queue[tuple[Cell, bool]]", folder: Path) -> None:
    """Runs one after another in a cluster of their own, until there are no more numbers."""
    signal(SIGTERM, stop)
    folder.mkdir()
    with ray_cluster() as cluster:
        matrix = prepare(cluster, folder)
        while (number := numbers.get()) is not None:
            results.put(judged(matrix, seed, number))


def main() -> int:
    seed = int(os.environ.get("CHAOS_SEED") or secrets.randbelow(10**6))
    count = int(os.environ.get("CHAOS_RUNS") or 5 * len(CELLS))
    only = os.environ.get("CHAOS_CASE")
    drawn = [int(number) for number in only.split(",")] if only else range(count)
    at_once = min(len(drawn), int(os.environ.get("CHAOS_AT_ONCE") or len(os.sched_getaffinity(0))))
    signal(SIGTERM, stop)
    print(f"CHAOS_SEED={seed}, {len(drawn)} runs, {at_once} at once", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    context = get_context("spawn")
    numbers: Queue[int | None] = context.Queue()
    results: Queue[tuple[Cell, bool]] = context.Queue()
    for number in [*drawn, *[None] * at_once]:
        numbers.put(number)
    parts = [context.Process(target=part, args=(seed, numbers, results, folder / str(i))) for i in range(at_once)]
    done: Counter[Cell] = Counter()
    failed: Counter[Cell] = Counter()
    try:
        for one in parts:
            one.start()
        while any(one.is_alive() for one in parts) or not results.empty():
            with suppress(Empty):
                cell, good = results.get(timeout=1)
                done[cell] += 1
                failed[cell] += not good
    finally:
        for one in parts:
            one.terminate()
            one.join()
    print(table(done, failed))
    if failed.total() or done.total() < len(drawn):
        print(f"{done.total() - failed.total()} of {len(drawn)} runs ended well; folders are kept in {folder}")
        return 1
    print(f"all {done.total()} runs ended as if nobody had died")
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
