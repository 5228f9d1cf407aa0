"""A run across three hosts that lose power and cables, and its head with it: `make test-cluster`."""

import hashlib
import json
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from buffer.journal import ALL_EPOCHS, read_counted
from tests.cluster.lab import DIRECTORY, HEAD, Lab, address, needs, wait_until
from tests.running import TIMEOUT_S

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(4 * 3600),
    pytest.mark.skipif(needs() is not None, reason=str(needs())),
]
FIRST, SECOND = 2, 3  # the hosts for samplers
BATCHES, MORE = 24, 6  # in the first part, and what the second adds
HOLD = DIRECTORY / "hold"  # all hosts see it: while it is there no score is given, and so the run cannot end

# Beside the checkout, in a folder that only the head has. It waits, as a remote service does, which gives the run a
# pace that leaves time for what happens to it, and says on which host it was.
REWARD = """
import socket, time
from pathlib import Path
import numpy as np
from rewards.base import Scores

class Paced:
    def __call__(self, images, prompts):
        time.sleep(1.5)
        while Path("/run/ddpo-hosts/hold").exists():
            time.sleep(0.1)
        return Scores(images.mean(axis=(1, 2, 3)).astype(np.float32), {"host": [socket.gethostname()] * len(images)})
"""
SETTINGS = [
    "buffer.max_staleness=2",
    "buffer.batch_size=16",
    "buffer.order_size=4",
    "buffer.claim_timeout_s=60",
    "evaluation.count=8",
    "evaluation.grid=4",
    "evaluation.every=1000",
    "samplers.count=3",
    "samplers.num_cpus=0.75",  # each host has room for one, and for all rewards beside it
    "samplers.threads=1",
    "learner.threads=1",
    "learner.microbatch=48",
    "learner.num_cpus=1",
    "learner.lr=1e-4",
    "rewards.mine.path=my_rewards:Paced",
    "rewards.mine.weight=0",
    "rewards.mine.num_cpus=0.1",
    "rewards.mine.timeout_s=7200",  # who waits for a host to come back does not hang
    "rewards.compressibility.num_cpus=0.1",
    "rewards.clip.num_cpus=0.02",
    "rewards.judge.num_cpus=0.02",
    "run.name=run",
]


class Run:
    """`launch.py` on the head, by ssh, as a process or as a job of the cluster; what it prints, as it comes."""

    def __init__(self, lab: Lab, batches: int, job: bool = False) -> None:
        home = DIRECTORY / "disk" / "home"
        settings = [*SETTINGS, f"run.batches={batches}", f"run.dir={home}/runs", "ray.address=auto"]
        settings += [f"model.path={home}/ddpo-ray/emoji_world/weights/pipeline"]
        settings += [f"run.mirror=file://{DIRECTORY}/mirror"]
        launch = f"~/ddpo-ray/.venv/bin/python -u ~/ddpo-ray/launch.py compressibility {' '.join(settings)}"
        submit = "~/ddpo-ray/.venv/bin/ray job submit --address http://127.0.0.1:8265 --working-dir . --"
        command = f"cd ~/mine; export RAY_AUTH_MODE=token; exec {submit if job else ''} {launch}"
        self.process = subprocess.Popen(
            lab.ssh_command(HEAD, command), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.lines: list[str] = []
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            print(time.strftime("%H:%M:%S"), line, end="", flush=True)
            self.lines.append(line.rstrip())

    def batches(self) -> int:
        """How many are trained, in this start or before, by the last line of one: "batch 27/30 ..."."""
        counts = [int(line.split()[1].partition("/")[0]) for line in self.lines if line.startswith("batch ")]
        return max(counts, default=0)

    def deaths(self) -> int:
        return sum(" died (" in line for line in self.lines)

    def wait(self) -> None:
        """Until it has ended well."""
        code = self.process.wait(TIMEOUT_S)
        self.reader.join()
        assert code == 0, self.lines[-20:]

    def until(self, condition: Any, what: str) -> float:
        def met() -> bool:
            assert self.process.poll() is None, f"the run ended before: {what}: {self.lines[-5:]}"
            return bool(condition())

        return wait_until(met, what)


@contextmanager
def running(lab: Lab, batches: int, job: bool = False) -> Iterator[Run]:
    run = Run(lab, batches, job)
    try:
        yield run
    finally:
        if run.process.poll() is None:
            run.process.send_signal(signal.SIGKILL)
            run.process.wait()


def rows_of(run_dir: Path) -> list[dict[str, Any]]:
    return [row for file in sorted(run_dir.glob("trajectories/*.parquet")) for row in pq.read_table(file).to_pylist()]


def assert_whole(rows: list[dict[str, Any]], batches: int) -> None:
    """Every trajectory of every batch once, scored by both rewards, none older than the bound."""
    assert sorted(row["trajectory_id"] for row in rows) == list(range(batches * 16))
    assert [row["batch"] for row in rows] == [row["trajectory_id"] // 16 for row in rows]
    assert not any(row["set_aside"] for row in rows)
    assert all(row["compressibility"] < 0 < row["mine"] for row in rows)
    assert max(row["age"] for row in rows) <= 2


def test_a_run_goes_on_whatever_happens_to_its_hosts(tmp_path: Path) -> None:
    with Lab() as lab:
        begin(lab)
        workers_die(lab, tmp_path / "first")
        head_dies(lab, tmp_path / "second")
        end(lab)


def begin(lab: Lab) -> None:
    """The cluster, and what is the user's own on the head."""
    lab.ray("up")
    lab.put(HEAD, "~/mine/my_rewards.py", REWARD)
    wait_until(lambda: lab.alive() == {HEAD, FIRST, SECOND}, "all hosts are in the cluster")
    boards = lab.ssh(HEAD, "ls ~/boards").stdout.split()
    assert {"default_grafana_dashboard.json", "ddpo_dashboard.json"} <= set(boards), boards
    status = f"~/ddpo-ray/.venv/bin/ray status --address {address(HEAD)}:6379"
    for stranger in ("RAY_AUTH_MODE=disabled", "RAY_AUTH_MODE=token RAY_AUTH_TOKEN=guessed"):
        answer = lab.ssh(FIRST, f"{stranger} timeout 600 {status}")
        assert answer.returncode != 0 and "CPU" not in answer.stdout, stranger
    answer = lab.ssh(FIRST, f"RAY_AUTH_MODE=token {status}")
    assert answer.returncode == 0 and "CPU" in answer.stdout, answer


def end(lab: Lab) -> None:
    """Ray ends on the head, and on the others when they have missed it for a minute."""
    lab.ray("down")

    def left() -> str:
        return "".join(
            lab.ssh(host, "pgrep -f '[r]aylet/raylet|[g]cs_server'").stdout for host in (HEAD, FIRST, SECOND)
        )

    wait_until(lambda: not left(), "no Ray is left on any host")


def workers_die(lab: Lab, copy: Path) -> None:
    """One loses power, one its cable; both come back; the run ends with every batch."""
    with running(lab, BATCHES) as run:
        first = {f"sampler-{number}.0" for number in range(3)}  # one on each host
        run.until(lambda: first <= at_work(lab), "each host's sampler has an order")
        deaths = run.deaths()
        lab.hosts("kill", FIRST)
        seconds = run.until(lambda: run.deaths() > deaths, "the driver notices the host without power")
        print(f"a host without power was noticed after {seconds:.0f} s")
        deaths = run.deaths()
        lab.hosts("cut", SECOND)
        HOLD.touch()  # until both are back
        seconds = run.until(lambda: run.deaths() > deaths, "the driver notices the silent host")
        print(f"a silent host was noticed after {seconds:.0f} s")
        lab.hosts("mend", SECOND)
        lab.hosts("revive", FIRST)
        lab.join(FIRST)
        seconds = run.until(lambda: lab.alive() == {HEAD, FIRST, SECOND}, "both hosts are in the cluster again")
        HOLD.unlink()
        print(f"both were back after {seconds:.0f} s, at batch {run.batches()} of {BATCHES}")
        run.wait()
    lab.fetch(HEAD, "~/runs/run", copy)
    rows = rows_of(copy)
    assert_whole(rows, BATCHES)
    assert {row["mine.host"] for row in rows} <= {f"ddpo-h{host}" for host in (HEAD, FIRST, SECOND)}
    claims = [record for record in read_counted(copy / "journal", ALL_EPOCHS)[0] if record["kind"] == "claimed"]
    assert {record["worker"] for record in claims} > first  # and others, on hosts that came back


def at_work(lab: Lab) -> set[str]:
    """Who has claimed an order in the run, by its journal on the head."""
    return set(re.findall(r'"worker": ?"([^"]+)"', lab.ssh(HEAD, "cat ~/runs/run/journal/*.jsonl").stdout))


def head_dies(lab: Lab, copy: Path) -> None:
    """The head and its disk are lost in the middle; a new one, with an empty disk, goes on from the mirror."""
    with running(lab, BATCHES + MORE) as run:
        run.until(lambda: run.batches() >= BATCHES + 3, "three more batches")
        lab.hosts("kill", HEAD)
    promised = head_of(DIRECTORY / "mirror" / "run")
    assert BATCHES <= sum(path.startswith("trajectories/") for path in promised) < BATCHES + MORE
    lab.hosts("revive", HEAD)
    for worker in (FIRST, SECOND):
        lab.hosts("kill", worker)
        lab.hosts("revive", worker)
    (DIRECTORY / "control").rename(DIRECTORY / "control of the lost head")
    begin(lab)
    with running(lab, BATCHES + MORE, job=True) as run:
        run.wait()
    lab.fetch(HEAD, "~/runs/run", copy)
    assert_whole(rows_of(copy), BATCHES + MORE)
    for path, sha256 in promised.items():
        assert hashlib.sha256((copy / path).read_bytes()).hexdigest() == sha256, path


def head_of(mirror: Path) -> dict[str, str]:
    """The rows of trajectories and evaluations that the mirror's newest HEAD promises: path and SHA-256."""
    body = (
        max(mirror.glob("*/head-*.json"), key=lambda path: (path.parent.name, path.name)).read_bytes().splitlines()[0]
    )
    files = json.loads(body)["files"]
    return {path: sha256 for path, (_, sha256) in files.items() if path.endswith(".parquet")}
