"""What the benchmarks measure with: the machine's own limits, a process's memory and time, growth with its error."""

import hashlib
import itertools
import math
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from common.machine import describe, machine_info

MIB = 2**20
COPIED = 512 * MIB  # more than any cache holds


def machine_line() -> str:
    """Machine, date and load average: figures without them mean nothing."""
    load = ", ".join(f"{value:.2f}" for value in os.getloadavg())
    return f"{describe(machine_info())}; {time.strftime('%Y-%m-%d %H:%M', time.gmtime())} UTC; load average {load}"


def limits(folder: Path, size: int) -> dict[str, float]:
    """MiB/s that one core and the disk under `folder` reach with pieces of `size` bytes: copying in memory, sha256,
    and writing new files with fsync. The median of nine pieces each."""
    data = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    large = np.resize(data, COPIED)
    target = np.zeros_like(large)

    with tempfile.TemporaryDirectory(dir=folder) as temporary:

        def write() -> None:
            with (Path(temporary) / str(time.monotonic_ns())).open("wb") as file:
                file.write(data.data)
                file.flush()
                os.fsync(file.fileno())

        return {
            "copy": COPIED / MIB / _median_seconds(lambda: np.copyto(target, large)),
            "sha256": size / MIB / _median_seconds(lambda: hashlib.sha256(data.data).digest()),
            "write and fsync": size / MIB / _median_seconds(write),
        }


def _median_seconds(action: Callable[[], object], repeats: int = 9) -> float:
    action()  # the first touches new memory
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds))


def cpu_seconds(pid: int) -> float:
    """Of a process since its start, all threads, user and system."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def own_memory(pid: int) -> float:
    """MiB of a process that are its own: neither mapped files nor the object store that it shares with others."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/{pid}/status has no line RssAnon")


def disk_use(folder: Path) -> float:
    """MiB of the files under a folder, some of which may vanish while we look."""
    size = 0
    for path in folder.rglob("*"):
        try:
            size += path.stat().st_size
        except FileNotFoundError:
            continue
    return size / MIB


def growth(times: np.ndarray, values: np.ndarray, edges: np.ndarray) -> tuple[float, float]:
    """(slope, its standard error), per unit of time, of a straight line through the means of the pieces between
    `edges`, which are indices.

    A saw-tooth is cut where it falls: its whole teeth say whether it grows, and where a piece begins does not matter.
    Neighbouring samples are alike, so the error comes from how the pieces' means scatter, not from how many samples
    there are.
    """
    pieces = list(itertools.pairwise(edges))
    t = np.array([times[start:end].mean() for start, end in pieces])
    v = np.array([values[start:end].mean() for start, end in pieces])
    slope, intercept = np.polyfit(t, v, 1)
    residuals = v - (slope * t + intercept)
    spread = math.sqrt(float((residuals**2).sum()) / (len(pieces) - 2))
    return float(slope), spread / math.sqrt(float(((t - t.mean()) ** 2).sum()))
