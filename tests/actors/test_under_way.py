"""One real run without an end, and what others may ask of it meanwhile: a second driver, other counts, Ctrl-C.

The tests follow one another.
"""

import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from buffer.journal import ALL_EPOCHS, read_counted
from conf.load import from_file
from conf.scale import REFUSED, REQUEST
from tests.run_files import trajectories
from tests.running import ROOT, TIMEOUT_S, Launched, launched, small, wait_for
from tests.running_local import launch_here, run_local

BAD = [
    b"samplers: {count: 2",
    b"\xff\xfe\x00",
    b"",
    b"samplers: 3\n",
    b"samplers: {count: 0}\n",
    b"learner: {lr: 1}\n",
    None,  # a folder of that name
]
SET_ASIDE = "a request for other counts, scale.yaml, is set aside"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the run is started."""
    return tmp_path_factory.mktemp("under_way")


def command(model: Path) -> list[str]:
    return small(model, "run", "run.batches=100000", "evaluation.every=100000")


@pytest.fixture(scope="module")
def run(model: Path, place: Path) -> Iterator[Launched]:
    with launched(*command(model), cwd=place, delays="policy.rollout:rollout:0.2") as run:
        run.wait_for_line("batch 1/")
        yield run


def test_a_second_driver_is_refused(run: Launched, model: Path, place: Path) -> None:
    second = launch_here(*command(model), cwd=place)
    assert second.returncode == 2
    assert "in use by another driver" in second.stderr and str(run.process.pid) in second.stderr
    assert len(second.stderr.splitlines()) == 1
    assert run.process.poll() is None


def test_bad_requests_are_set_aside_and_the_run_goes_on(run: Launched, place: Path) -> None:
    folder = place / "runs" / "run"
    for number, content in enumerate(BAD, start=1):
        (folder / REQUEST).mkdir() if content is None else (folder / REQUEST).write_bytes(content)
        wait_for("a refused request", lambda n=number: len(list(folder.glob(REFUSED))) == n, run)  # type: ignore[misc]
    for _ in BAD[1:]:  # the same sentence is not said twice
        run.wait_for_line(SET_ASIDE)


def scale(place: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "launch.py"), "--scale", "runs/run", *words]
    return subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=TIMEOUT_S)


def test_counts_change_while_the_run_goes_on(run: Launched, place: Path) -> None:
    """From one sampler to three, back to one in the middle of their orders, and to two: who comes back gets work."""
    folder = place / "runs" / "run"
    for words in (["samplers.count=3", "rewards.compressibility.count=2"], ["samplers.count=1"]):
        done = scale(place, *words)
        assert done.returncode == 0, done.stderr
        assert words[0].split("=")[0] in done.stdout
        wait_for(words[0], partial(count_is, int(words[0][-1]), run), run)
    assert scale(place, "samplers.count=2").returncode == 0
    wait_for("work for the second sampler-1", lambda: "sampler-1.1" in workers(folder), run)
    config = from_file(folder / "config.yaml")
    assert (config.samplers.count, config.rewards["compressibility"].count) == (2, 2)
    assert config.samplers.num_gpus == 1  # as it was given, though there is none here


def count_is(count: int, run: Launched) -> bool:
    return len(run.actors("SamplerActor")) == count


def workers(folder: Path) -> set[str]:
    """Who has claimed anything."""
    records, _ = read_counted(folder / "journal", before=ALL_EPOCHS)
    return {record["worker"] for record in records if record["kind"] == "claimed"}


def test_ctrl_c_ends_it_and_nothing_is_missing(run: Launched, place: Path) -> None:
    run.process.send_signal(signal.SIGINT)
    output, errors = run.process.communicate(timeout=TIMEOUT_S)
    assert run.process.returncode == 0, (output, errors)
    assert "samplers.count 3 -> 1" in output and "died" not in output
    rows = trajectories(place / "runs" / "run")
    assert [row["trajectory_id"] for row in rows] == list(range(len(rows))) and rows
    late = scale(place, "samplers.count=1")
    assert late.returncode == 2 and "no driver works on" in late.stderr


def test_a_request_that_was_left_from_before_is_set_aside(model: Path, tmp_path: Path) -> None:
    words, folder = small(model, "run", "run.batches=1"), tmp_path / "runs" / "run"
    assert run_local(*words, cwd=tmp_path).returncode == 0
    (folder / REQUEST).write_text("samplers: {count: 2}\n")
    done = launch_here(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"{SET_ASIDE}: it was left from before this start" in done.stdout
    assert not (folder / REQUEST).exists() and len(list(folder.glob(REFUSED))) == 1
    assert from_file(folder / "config.yaml").samplers.count == 1
