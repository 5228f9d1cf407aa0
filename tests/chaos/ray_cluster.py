"""A Ray cluster for many runs, so that none of them waits for its own: free ports, a folder and a token of its own."""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.running import FAULTS, TIMEOUT_S, parent, processes, wait_for_ray_to_end


@dataclass
class RayCluster:
    address: str
    folder: Path  # for what lies beside a run; Ray's own files are in folder/ray
    environment: dict[str, str]  # of who connects

    @property
    def fault(self) -> Path:
        """What is written here is the FAULT of actors that start from now on (tests/faults/sitecustomize.py)."""
        return self.folder / "fault"

    @property
    def mark(self) -> Path:
        return self.folder / "mark"

    @property
    def released(self) -> Path:
        """While it is there, who stands still at its fault goes on."""
        return self.folder / "mark.released"

    def actors(self) -> dict[str, int]:
        """Process ids of the actors that are up, by the name that each gives itself: "sampler-0.0", "buffer"."""
        return {name: pid for pid in self._workers() if (name := self._name(pid))}

    def busy(self) -> list[int]:
        """Process ids of actors, and of workers that compute something: not of Ray's spare workers and its agents."""
        return [pid for pid in self._workers() if not _title(pid).startswith("ray::IDLE")]

    def _workers(self) -> list[int]:
        raylets = set(processes(self.folder))
        return [pid for pid in processes("ray::") if parent(pid) in raylets and "Agent" not in _title(pid)]

    def _name(self, pid: int) -> str:
        """Ray writes it into the first lines of the process's log."""
        for log in (self.folder / "ray" / "session_latest" / "logs").glob(f"worker-*-{pid}.out"):
            names = [line for line in log.read_text().splitlines() if line.startswith(":actor_name:")]
            return names[-1].removeprefix(":actor_name:") if names else ""
        return ""


@contextmanager
def ray_cluster(cpus: int = 4) -> Iterator[RayCluster]:
    """Started by `ray start`, ended by its process id. Raises AssertionError if a process of it stays."""
    folder = Path(tempfile.mkdtemp(prefix="ddpo-"))  # short, because Ray's socket paths must be
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    environment = dict(os.environ, **token, RAY_raylet_start_wait_time_s=str(int(TIMEOUT_S)))
    port, *others = free_ports(4)
    cluster = RayCluster(f"127.0.0.1:{port}", folder, environment)
    options = {
        "head": None,
        "block": None,
        "disable-usage-stats": None,
        "include-dashboard": "false",
        "node-ip-address": "127.0.0.1",
        "temp-dir": f"{folder}/ray",
        "num-cpus": cpus,
        "port": port,
        "ray-client-server-port": others[0],
        "dashboard-agent-listen-port": others[1],
        "dashboard-port": others[2],
        "min-worker-port": 0,  # any that is free
        "max-worker-port": 0,
    }
    words = [f"--{name}" if value is None else f"--{name}={value}" for name, value in options.items()]
    faults = {"PYTHONPATH": str(FAULTS), "FAULT": f"@{cluster.fault}", "FAULT_MARK": str(cluster.mark)}
    with (folder / "ray.log").open("w") as log:
        process = subprocess.Popen(
            [Path(sys.executable).with_name("ray"), "start", *words],
            env=environment | faults,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        _wait_until_it_listens(port, process, folder / "ray.log")
        yield cluster
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()
        wait_for_ray_to_end(folder)
        shutil.rmtree(folder, ignore_errors=True)


def free_ports(count: int) -> list[int]:
    """All of them different, for they are held until the last is found."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    return ports


def _wait_until_it_listens(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        if "Ray runtime started" in log.read_text():
            return
        time.sleep(0.2)


def _title(pid: int) -> str:
    """What `ps` shows: Ray puts there what a worker does. Empty once it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().strip("\0 ")
    except (FileNotFoundError, ProcessLookupError):
        return ""
