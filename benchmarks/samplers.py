"""How many samplers one buffer serves, and whether its memory and its disk stay flat.

    python -m benchmarks.samplers                                  # 1, 4, 16 and 64 samplers, about 3 minutes each
    python -m benchmarks.samplers --samplers 64 --minutes 10       # retention at work: does anything grow?

Real are: the buffer actor with its journal, files and digests, the reward actor, Ray, and the tables: trajectories as
Stable Diffusion 1.5 makes them at 50 steps, latents [51, 4, 64, 64] float32 and a picture of 512x512, 4 MB each.
Simulated are: the rollout, which is a wait of 8 s a trajectory; the reward, which answers at once; and the learner,
which takes each batch, writes a tiny recovery point and the batch's Parquet file, and registers them. Samplers are
threads of up to 8 Ray actors, as 64 processes would need the memory of 64 Pythons.

Each sampler's first order takes another share of the time, so that orders come in one after another from the start, as
those of a fleet that has long been at work; together they would drift apart while we measure, and `tensors/` with them.
Throughput is counted per sampler from its first order's end to its last one's, so that every wait of whole orders is
in it, and nothing of the start.
"""

import argparse
import itertools
import os
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from actors.buffer_actor import BufferActor
from actors.cluster import cluster
from actors.remote_buffer import RemoteBuffer
from actors.reward_actor import RewardActor
from benchmarks.measure import MIB, cpu_seconds, disk_use, growth, limits, machine_line, own_memory
from buffer.orders import Plan, Version
from buffer.rows import Combination
from buffer.rules import Rules
from buffer.schema import rollout_table
from buffer.store import write_batch
from common.commands import at_least_1
from common.terminal import print_anywhere
from conf.schema import Config, RayConfig, RewardConfig

ROLLOUT_S = 8.0  # a trajectory
STEPS = 50
# Batches as large as the paper's; with k = 2 one order for each of 64 samplers lies open beyond those in their hands.
PLAN = Plan(seed=0, prompts=("a cat", "a dog"), batch_size=256, order_size=4, sets=())
ORDER_S = ROLLOUT_S * PLAN.order_size
MAX_STALENESS, KEEP_BATCHES = 2, 2
PROCESSES = 8


class MeasuredBuffer(BufferActor):
    """The buffer actor, which also says which process it is."""

    async def process(self) -> int:
        return os.getpid()


class AtOnce:
    """A reward that takes no time."""

    def __call__(self, images: np.ndarray, prompts: list[str]) -> np.ndarray:
        return np.arange(len(prompts), dtype=np.float32)


@dataclass
class Sampled:
    """One sampler's orders, in seconds."""

    ends: list[float] = field(default_factory=list)  # when each was taken in
    claims: list[float] = field(default_factory=list)  # how long it waited for each
    adds: list[float] = field(default_factory=list)  # how long each took to be taken in

    @property
    def rate(self) -> float:
        """Trajectories a second, over whole orders, without the first: it has the start in it."""
        return PLAN.order_size * (len(self.ends) - 1) / (self.ends[-1] - self.ends[0])


class Samplers:
    """Some simulated samplers in one process, a thread each."""

    def run(self, buffer: ray.actor.ActorHandle[Any], first_s: dict[str, float], until: float) -> list["Sampled"]:
        """What each of them did; an order that is begun before `until` (unix seconds) is finished.

        first_s: how long each one's first order takes, by its name."""
        self.table = _trajectories()
        self.found = {name: Sampled() for name in first_s}
        threads = [threading.Thread(target=self._sample, args=(buffer, *each, until)) for each in first_s.items()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return list(self.found.values())

    def _sample(self, buffer: ray.actor.ActorHandle[Any], name: str, rollout_s: float, until: float) -> None:
        found, remote = self.found[name], RemoteBuffer(buffer)
        asked = time.monotonic()
        while time.time() < until or len(found.ends) < 2:
            claim = remote.claim(name)
            if claim is None:
                continue
            found.claims.append(time.monotonic() - asked)
            time.sleep(rollout_s)
            rollout_s = ORDER_S
            done = time.monotonic()
            ids = pa.array(claim.order.trajectory_ids, pa.int64())
            assert remote.add(claim.order.order_id, claim.version, self.table.set_column(0, "trajectory_id", ids))
            asked = time.monotonic()
            found.adds.append(asked - done)
            found.ends.append(asked)


class Learner:
    """Takes batches and registers what training would leave."""

    def run(self, buffer: ray.actor.ActorHandle[Any], run_dir: Path) -> None:
        remote = RemoteBuffer(buffer, "learner-0")
        first = remote.initial_recovery_point()
        _write_recovery_point(run_dir / first)
        remote.trained(-1, Version(0, "0"), first, "")
        while True:
            taken = remote.take("learner-0")
            if taken is not None:
                _write_recovery_point(run_dir / taken.recovery_point)
                write_batch(run_dir, taken, taken.table["reward"].to_numpy(), time.time())
                version = Version(taken.batch + 1, str(taken.batch + 1))
                remote.trained(taken.batch, version, taken.recovery_point, taken.parquet)


def _trajectories() -> pa.Table:
    """An order's, of random numbers."""
    rng = np.random.default_rng(os.getpid())
    n = PLAN.order_size
    return rollout_table(
        PLAN.order("b00000.00"),
        rng.integers(0, 256, (n, 512, 512, 3), np.uint8),
        {
            "latents": rng.standard_normal((n, STEPS + 1, 4, 64, 64), np.float32),
            "timesteps": np.tile(np.arange(STEPS, 0, -1, dtype=np.int32), (n, 1)),
            "log_probs": rng.standard_normal((n, STEPS), np.float32),
        },
    )


def _write_recovery_point(folder: Path) -> None:
    folder.mkdir()
    (folder / "state.json").write_text("{}", encoding="utf-8")


@dataclass(frozen=True)
class Measured:
    """One run; seconds are per order, without each sampler's first."""

    rate: float  # trajectories a second
    claim_s: float  # mean wait for an order
    add_s: float  # mean time to hand one in
    longest_s: float  # of one order, both together
    samples: np.ndarray  # [seconds, 6], see `_watch`


def measure(count: int, seconds: float, folder: Path) -> Measured:
    """One run with `count` samplers for `seconds`."""
    run_dir = folder / f"samplers-{count}"
    rules = Rules(
        PLAN.sizes, ("flat",), 10**6, MAX_STALENESS, keep_batches=KEEP_BATCHES, lease_timeouts={"flat": 600.0}
    )
    with cluster(Config(ray=RayConfig(dashboard=False, temp_dir=str(folder / "ray")))):
        start: Any = ray.remote(num_cpus=0, max_task_retries=0)
        buffer = start(MeasuredBuffer).remote(run_dir, PLAN, rules, Combination({"flat": 1.0}))
        learner = start(Learner).remote()
        reward = start(RewardActor).remote("reward-flat-0", "flat", RewardConfig(path="benchmarks.samplers:AtOnce"))
        hosts = [start(Samplers).remote() for _ in range(min(count, PROCESSES))]
        pid = ray.get(buffer.process.remote())
        working = [learner.run.remote(buffer, run_dir), reward.run.remote(buffer)]
        first_s = [(f"sampler-{index}", ORDER_S * (index + 1) / count) for index in range(count)]
        until = time.time() + seconds
        runs = [host.run.remote(buffer, dict(first_s[i :: len(hosts)]), until) for i, host in enumerate(hosts)]
        samples = _watch(buffer, pid, run_dir, runs, working)
        sampled = [sampler for host in ray.get(runs) for sampler in host]
        for actor in (buffer, learner, reward, *hosts):
            ray.kill(actor)
    waits = [claim + add for one in sampled for claim, add in zip(one.claims[1:], one.adds[1:], strict=True)]
    return Measured(
        rate=sum(one.rate for one in sampled),
        claim_s=float(np.mean([wait for one in sampled for wait in one.claims[1:]])),
        add_s=float(np.mean([wait for one in sampled for wait in one.adds[1:]])),
        longest_s=max(waits),
        samples=samples,
    )


def _watch(
    buffer: ray.actor.ActorHandle[Any],
    pid: int,
    run_dir: Path,
    runs: list[ray.ObjectRef[list[Sampled]]],
    working: list[ray.ObjectRef[None]],
) -> np.ndarray:
    """Publishes what is trained, as the driver does, until all samplers are done. A row a second: time in s, the
    buffer's CPU seconds, its own memory, the object store in use, tensors/ and all the rest of the run folder, MiB."""
    samples, remote = [], RemoteBuffer(buffer)
    next_sample = time.monotonic()
    store = ray.cluster_resources()["object_store_memory"]
    while len(ray.wait(runs, num_returns=len(runs), timeout=0)[0]) < len(runs):
        news = remote.poll(1.0)
        for version, _ in news.to_publish:
            remote.publish(version, [ray.put({})])
        if news.stop or (ended := ray.wait(working, timeout=0)[0]):
            raise RuntimeError(news.stop or f"a worker ended: {ray.get(ended)}")
        if time.monotonic() >= next_sample:
            used = (store - ray.available_resources().get("object_store_memory", store)) / MIB
            tensors = disk_use(run_dir / "tensors")
            rest = sum(disk_use(folder) for folder in run_dir.iterdir() if folder.name != "tensors")
            samples.append((time.monotonic(), cpu_seconds(pid), own_memory(pid), used, tensors, rest))
            next_sample += 1.0
    return np.array(samples)


COLUMNS = (
    "samplers",
    "traj/s",
    "of n/8 s",
    "of linear",
    "MiB/s",
    "claim",
    "add",
    "longest",
    "core",
    "memory",
    "store",
    "tensors/",
)


def report(count: int, found: Measured, linear: float) -> None:
    """A row of the table: docs/performance.md explains its columns."""
    samples = found.samples
    seconds, cpu = (samples[-1, :2] - samples[0, :2]).tolist()
    figures = (
        f"{count}",
        f"{found.rate:.3f}",
        f"{100 * found.rate * ROLLOUT_S / count:.1f} %",
        f"{100 * found.rate / linear:.1f} %",
        f"{found.rate * _trajectories().nbytes / PLAN.order_size / MIB:.1f}",
        f"{found.claim_s:.2f} s",
        f"{found.add_s:.2f} s",
        f"{found.longest_s:.2f} s",
        f"{100 * cpu / seconds:.1f} %",
        *(f"{value:.0f} MiB" for value in samples[:, 2:5].max(axis=0)),
    )
    print(" | ".join(f"{figure:>9s}" for figure in figures), flush=True)


def report_growth(samples: np.ndarray) -> None:
    """Slopes over whole periods of retention, from one dropped batch to the next, and the range of the periods' lowest
    values: what is never let go of raises these."""
    minutes, tensors = samples[:, 0] / 60, samples[:, 4]
    drops = np.flatnonzero(np.diff(tensors) < -PLAN.batch_size) + 1  # a batch has some 4 MiB a trajectory
    if len(drops) < 4:
        print(f"retention has dropped {len(drops)} batches, too few to say what grows: let it run longer")
        return
    print(f"growth over the {np.ptp(minutes[drops]):.1f} minutes between the first and the last of {len(drops)} drops:")
    for column, name in ((2, "buffer's own memory"), (3, "object store"), (4, "tensors/"), (5, "rest of the folder")):
        values = samples[:, column]
        slope, error = growth(minutes, values, drops)
        mean = values[drops[0] : drops[-1]].mean()
        lows = [values[start:end].min() for start, end in itertools.pairwise(drops)]
        lowest = f"lowest of a period {min(lows):.2f} to {max(lows):.2f}"
        print(f"  {name:22s} mean {mean:9.2f} MiB, slope {slope:+9.3f} ± {error:.3f} MiB a minute; {lowest}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samplers", type=at_least_1, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--minutes", type=float, default=2.5, help="of each count of samplers")
    parser.add_argument("--dir", type=Path, default=None, help="a folder on the disk to measure; by default TMPDIR's")
    options = parser.parse_args(arguments)
    print(machine_line())
    with tempfile.TemporaryDirectory(prefix="ddpo-", dir=options.dir) as temporary:
        folder = Path(temporary)
        found = limits(folder, _trajectories().nbytes)
        print("one core and this disk: " + ", ".join(f"{name} {rate:.0f} MiB/s" for name, rate in found.items()))
        print(" | ".join(f"{name:>9s}" for name in COLUMNS))
        first = None
        for count in options.samplers:
            measured = measure(count, 60 * options.minutes, folder)
            first = first or measured.rate / count
            report(count, measured, first * count)
            report_growth(measured.samples)
    print(machine_line())


if __name__ == "__main__":
    print_anywhere()
    main()
