"""What bounded asynchrony gains: the same work in overlap and strictly one after another, through `launch.py`.

    python -m benchmarks.overlap waits      # rollout, reward and learner wait equally long: the ideal gain is 3
    python -m benchmarks.overlap service    # the shipped model, and a reward that waits as long as the rest computes
    python -m benchmarks.overlap threads    # the shipped model in overlap: OpenMP's threads that spin, or that sleep
    python -m benchmarks.overlap samplers   # the shipped model: one sampler of two threads, or two of one thread

waits: the real fleet, buffer and driver, with a model so small that its computing hardly counts, and waits in place of
it: 1 s an order in rollout and in reward, 4 s a batch of four orders in the learner. The synchronous run rolls out a
whole batch, then scores all of it, then learns. (At max_staleness=0 the buffer is faster than that: it scores the first
order while the second is rolled out. So there the reward's 4 s are moved to where a run strictly one after another has
them, in front of the learner's.) The gain is compared with the ideal, (R+W+L)/max(R,W,L) of the waits that were asked
for. What fleet, buffer and the small model's computing add is in both runs, and weighs more in the overlapped one.

service: Emoji World with the settings of the compressibility experiment. First the time of a batch without any wait,
which is that of rollout and learning together; then a reward that answers after as long a time, as a remote service
would, to several requests at once: max_staleness=0, which with such a reward is strictly one after another, against 2.
(1 would do if nothing ever varied: then its bound and the computing allow the same 2, and any delay costs both.)

threads: Emoji World with the settings of the compressibility experiment at max_staleness=2. Sampler and learner compute
at once, with two threads each, on whatever cores there are; OMP_WAIT_POLICY says how threads wait for one another.

samplers: Emoji World with the settings of the compressibility experiment, at max_staleness=0: the samplers and the
learner, which has two threads, take turns.

Runs alternate, A B A B. The time of a batch is the mean over the middle of a run, from the journal.
"""

import argparse
import os
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.measure import machine_line
from buffer.run_folder import RunFolder
from common.commands import at_least_1
from common.terminal import print_anywhere
from tests.pipelines import tiny_pipeline
from tests.running import ROOT, SMALL, launched

TIMEOUT_S = 900.0
BATCHES = 14
BEGINNING, END = 4, 2  # batches that are not counted: the pipeline fills, and runs empty
BATCH_S = 4.0  # of rollout, of reward, and of the learner
ORDERS = 4
LITTLE_COMPUTING = ["sampling.steps=2", "sampling.guidance=1", "learner.optimizer_steps=1", "learner.microbatch=16"]
REQUESTS = 8  # that the remote service takes at once
ONE_OF_TWO = ("samplers.count=1", "samplers.threads=2")
TWO_OF_ONE = ("samplers.count=2", "samplers.threads=1")


def batch_seconds(folder: Path, arguments: Sequence[str], reward_s: float, delays: str = "") -> float:
    """The mean time of a batch of one run of `launch.py` with these arguments, and a reward that waits."""
    run_dir = Path(tempfile.mkdtemp(dir=folder))
    command = [
        "compressibility",
        *arguments,
        "rewards.compressibility.path=benchmarks.remote:Remote",
        f"rewards.compressibility.args={{seconds: {reward_s}}}",
        f"run.batches={BATCHES}",
        "evaluation.every=1000",
        f"run.dir={run_dir}",
        "run.name=run",
    ]
    with launched(*command, cwd=ROOT, delays=delays) as run:
        try:
            _, errors = run.process.communicate(timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"a run did not end in {TIMEOUT_S:.0f} s") from error
        if run.process.returncode:
            raise RuntimeError(errors)
    history = RunFolder(run_dir / "run").history
    ends = [record["time"] for record in history if record["kind"] == "trained" and record["batch"] >= 0]
    counted = ends[BEGINNING - 1 : -END]
    return float((counted[-1] - counted[0]) / (len(counted) - 1))


def waits(folder: Path, pairs: int) -> None:
    small = [*SMALL, *LITTLE_COMPUTING, f"model.path={tiny_pipeline(folder / 'tiny')}"]
    rollout = f"policy.rollout:rollout:{BATCH_S / ORDERS}"

    def synchronous() -> float:
        learner = f"learner.learner:Learner.train:{2 * BATCH_S}"
        return batch_seconds(folder, [*small, "buffer.max_staleness=0"], 0.0, f"{rollout},{learner}")

    def overlapped() -> float:
        learner = f"learner.learner:Learner.train:{BATCH_S}"
        return batch_seconds(folder, [*small, "buffer.max_staleness=2"], BATCH_S / ORDERS, f"{rollout},{learner}")

    print(f"waits of {BATCH_S:g} s a batch each in rollout, reward and learner; {ORDERS} orders a batch")
    ratio, spread = compare({"one after another": synchronous, "in overlap": overlapped}, pairs)
    print(f"{ratio:.2f} ± {spread:.2f} times the synchronous throughput, {100 * ratio / 3:.0f} % of the ideal 3")


def service(folder: Path, pairs: int) -> None:
    alone = batch_seconds(folder, ["buffer.max_staleness=0", "evaluation.count=16"], 0.0)
    print(f"rollout and learning of a batch take {alone:.2f} s together; the reward waits as long for each order")
    pool = [f"rewards.compressibility.count={REQUESTS}", "rewards.compressibility.num_cpus=0", "evaluation.count=16"]

    def synchronous() -> float:
        return batch_seconds(folder, [*pool, "buffer.max_staleness=0"], alone)

    def overlapped() -> float:
        return batch_seconds(folder, [*pool, "buffer.max_staleness=2"], alone)

    ratio, spread = compare({"one after another": synchronous, "in overlap": overlapped}, pairs)
    print(f"{ratio:.2f} ± {spread:.2f} times the synchronous throughput; 2 if computing takes equally long in both")


def threads(folder: Path, pairs: int) -> None:
    def waiting(policy: str) -> float:
        os.environ["OMP_WAIT_POLICY"] = policy
        return batch_seconds(folder, [*ONE_OF_TWO, "buffer.max_staleness=2", "evaluation.count=16"], 0.0)

    kinds = {"spinning": partial(waiting, "active"), "sleeping": partial(waiting, "passive")}
    ratio, spread = compare(kinds, pairs)
    print(f"threads that sleep give {ratio:.2f} ± {spread:.2f} times the throughput of threads that spin")


def samplers(folder: Path, pairs: int) -> None:
    def times(*settings: str) -> float:
        return batch_seconds(folder, [*settings, "evaluation.count=16"], 0.0)

    ratio, spread = compare(
        {"one sampler of two threads": partial(times, *ONE_OF_TWO), "two of one": partial(times, *TWO_OF_ONE)}, pairs
    )
    print(f"two samplers of one thread give {ratio:.2f} ± {spread:.2f} times the throughput of one of two threads")


def compare(kinds: Mapping[str, Callable[[], float]], pairs: int) -> tuple[float, float]:
    """The mean ratio of times of `pairs` alternating pairs of runs, the first kind's to the second's, and its standard
    deviation."""
    first, second = kinds
    ratios = []
    for _ in range(pairs):
        one, other = kinds[first](), kinds[second]()
        ratios.append(one / other)
        print(f"a batch: {first} {one:.2f} s, {second} {other:.2f} s, ratio {one / other:.2f}", flush=True)
    return float(np.mean(ratios)), float(np.std(ratios, ddof=1)) if pairs > 1 else float("nan")


KINDS = {"waits": waits, "service": service, "threads": threads, "samplers": samplers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=KINDS)
    parser.add_argument("--pairs", type=at_least_1, default=3)
    options = parser.parse_args()
    print(machine_line())
    with tempfile.TemporaryDirectory(prefix="ddpo-") as temporary:
        KINDS[options.what](Path(temporary), options.pairs)
    print(machine_line())


if __name__ == "__main__":
    print_anywhere()
    main()
