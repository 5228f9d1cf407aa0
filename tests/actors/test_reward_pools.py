"""Pools of rewards in real runs: slow ones hold nobody up, and those that fail, hang or die lose nothing."""

import contextlib
import itertools
import json
import os
import re
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from buffer.journal import ALL_EPOCHS, read_counted
from buffer.run_folder import RunFolder
from tests.running import TIMEOUT_S, launch, launched, small, wait_for
from tests.running_local import run_local

# A reward that judges by the picture's own bytes, so that the same pictures fail whoever scores them. The trial before
# the first rollout, which begins with a ramp from 0 to 255, always goes well.
REWARD = """
import hashlib, time
from pathlib import Path
import numpy as np

class Reward:
    def __call__(self, images, prompts):
        scores = images.mean(axis=(1, 2, 3)).astype(np.float32)
        ramp = np.linspace(0, 255, images[0].size).astype(np.uint8)
        if (images[0].ravel() == ramp).all():
            return scores
        numbers = [int(hashlib.sha256(image.tobytes()).hexdigest(), 16) for image in images]
        unlucky = [number // 10 % 3 if number % 10 == 0 else None for number in numbers]
        {body}
        return scores
"""
BATCHES = 6


def has_scored(orders: int, journal: Path) -> bool:
    """Whether the reward has scored so many."""
    records = read_counted(journal, before=ALL_EPOCHS)[0] if journal.is_dir() else []
    return sum(record["kind"] == "scored" and record["reward"] == "mine" for record in records) >= orders


def command(model: Path, folder: Path, body: str, *more: str) -> list[str]:
    (folder / "my_rewards.py").write_text(REWARD.format(body=body))
    reward = ["rewards.mine.path=my_rewards:Reward", "rewards.mine.num_cpus=0.2", "rewards.compressibility.weight=0"]
    return small(model, "run", *reward, *more)


def rows(folder: Path) -> list[dict[str, Any]]:
    files = sorted((folder / "runs" / "run" / "trajectories").glob("*.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def test_one_picture_in_ten_that_fails_is_set_aside_with_the_reason(model: Path, tmp_path: Path) -> None:
    """It raises, is given NaN, or costs the whole answer a score: a third of the failing pictures each."""
    body = """
        if 0 in unlucky: raise RuntimeError('no face found')
        scores[[kind == 1 for kind in unlucky]] = np.nan
        if unlucky[0] == 2: scores = scores[:-1]"""
    sizes = ["run.batches=10", "buffer.batch_size=24", "buffer.order_size=4", "learner.microbatch=36"]
    done = run_local(*command(model, tmp_path, body, *sizes, "buffer.max_failed_share=0.9"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = rows(tmp_path)
    assert sorted(row["trajectory_id"] for row in found) == list(range(240))
    # Some two dozen, on any machine, whatever its last bits.
    aside = [row["set_aside"] for row in found if row["set_aside"]]
    assert 0 < len(aside) < len(found) / 4
    for reason in (
        "mine: RuntimeError: no face found",
        "mine: Reward mine gave nan",
        "mine: Reward mine gave scores of",
    ):
        assert any(text.startswith(reason) for text in aside), aside
    assert all(row["reward"] == row["mine"] > 0 for row in found if not row["set_aside"])


def test_a_reward_that_answers_in_other_types_than_before_ends_the_run_in_a_sentence(
    model: Path, tmp_path: Path
) -> None:
    body = """
        from rewards.base import Scores
        self.calls = getattr(self, 'calls', 0) + 1
        return Scores(scores, {'note': [self.calls if self.calls < 4 else 'many'] * len(scores)})"""
    done = run_local(*command(model, tmp_path, body), cwd=tmp_path)
    assert done.returncode == 2, (done.stdout, done.stderr)
    assert "Reward mine put text into column 'note', where it put numbers before" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_reward_on_a_sick_device_gives_way_to_another_and_no_picture_is_set_aside(
    model: Path, tmp_path: Path
) -> None:
    """The first process that scores pictures of the run fails within milliseconds, whatever it is asked."""
    body = """
        import os
        sick = Path('sick')
        if not sick.exists():
            sick.write_text(str(os.getpid()))
        if sick.read_text() == str(os.getpid()):
            raise RuntimeError('CUDA error: device-side assert triggered')"""
    done = launch(*command(model, tmp_path, body, "run.batches=1"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "reward-mine-0.0 died (RuntimeError: CUDA error" in done.stdout
    found = rows(tmp_path)
    assert len(found) == 8 and not any(row["set_aside"] for row in found)


def test_a_pool_on_a_sick_device_ends_the_run_which_goes_on_elsewhere(model: Path, tmp_path: Path) -> None:
    body = """
        if not Path('elsewhere').exists():
            raise RuntimeError('CUDA error: device-side assert triggered')"""
    words = command(model, tmp_path, body, "run.batches=1")
    done = launch(*words, cwd=tmp_path)
    assert done.returncode == 2, done.stdout
    (sentence,) = done.stderr.strip().splitlines()
    assert "reward-mine-0 failed 5 times in a row" in sentence and "CUDA error" in sentence
    (tmp_path / "elsewhere").touch()
    done = run_local(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = rows(tmp_path)
    assert len(found) == 8 and not any(row["set_aside"] for row in found)


def test_a_reward_that_hangs_on_one_picture_is_killed_and_the_picture_set_aside(model: Path, tmp_path: Path) -> None:
    body = """
        cursed = Path('cursed')
        mine = [hashlib.sha256(image.tobytes()).hexdigest() for image in images]
        if not cursed.exists():
            cursed.write_text(mine[-1])
        if cursed.read_text() in mine:
            time.sleep(3600)"""
    more = ["run.batches=1", "evaluation.every=1", "buffer.max_failed_share=0.3", "rewards.mine.timeout_s=10"]
    done = launch(*command(model, tmp_path, body, *more), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    files = [*(tmp_path / "runs" / "run").glob("trajectories/*.parquet")]
    files += (tmp_path / "runs" / "run").glob("evaluation/*.parquet")
    found = [row for file in files for row in pq.read_table(file).to_pylist()]
    aside = [row["set_aside"] for row in found if row["set_aside"]]
    assert len(aside) == 1 and "died on this picture alone" in aside[0]
    assert len(found) == 8 + 2 * 4


def test_with_its_pool_killed_again_and_again_every_trajectory_is_scored_once(model: Path, tmp_path: Path) -> None:
    """Every tenth order that is scored kills all who score, whatever they are at."""
    more = ["run.batches=8", "rewards.mine.count=2", "buffer.max_staleness=1"]
    journal = tmp_path / "runs" / "run" / "journal"
    with launched(*command(model, tmp_path, "time.sleep(0.3)", *more), cwd=tmp_path) as run:
        for orders in (6, 16, 26):  # of 36: four a batch, and two for each of two evaluations
            wait_for(f"{orders} scored orders", partial(has_scored, orders, journal), run)
            for actor in wait_for("an actor of the pool", lambda: run.actors("RewardActor"), run):
                with contextlib.suppress(ProcessLookupError):  # a last one's, which has ended by now
                    os.kill(actor, signal.SIGKILL)
        output, errors = run.process.communicate(timeout=TIMEOUT_S)
    assert run.process.returncode == 0, errors
    assert len(re.findall(r"reward-mine-\d\.\d+ died", output)) >= 3
    (sitting,) = RunFolder(tmp_path / "runs" / "run").record["sittings"].values()
    scoring = sum(sitting["seconds"][f"reward-mine-{place}"].get("scoring", 0.0) for place in (0, 1))
    assert scoring > 0.3 * 20  # of 36 orders; who was there last has scored ten, and a killed one's last are not heard
    found = rows(tmp_path)
    assert [row["trajectory_id"] for row in found] == list(range(8 * 8))
    assert not any(row["set_aside"] for row in found)
    assert all(row["reward"] == row["mine"] > 0 for row in found)
    assert max(row["age"] for row in found) <= 1


def test_samplers_hardly_wait_for_a_reward_as_slow_as_the_rollout(model: Path, tmp_path: Path) -> None:
    """Rollout and reward take a second an order each, learning a second a batch of four orders."""
    more = [f"run.batches={BATCHES}", "buffer.max_staleness=1"]
    delays = "policy.rollout:rollout:1,learner.learner:Learner.train:1"
    done = launch(*command(model, tmp_path, "time.sleep(1)", *more), cwd=tmp_path, delays=delays)
    assert done.returncode == 0, done.stderr
    found = rows(tmp_path)
    times = {(row["claimed"], row["rolled_out"], row["scored"]) for row in found if 0 < row["batch"] < BATCHES - 1}
    orders = sorted(times)
    assert len(orders) == 4 * (BATCHES - 2)
    span = (orders[-1][1] - orders[0][0]).total_seconds()
    busy = sum((rolled_out - claimed).total_seconds() for claimed, rolled_out, _ in orders)
    print(f"the sampler waited {1 - busy / span:.1%} of {span:.1f} s")
    assert span > len(orders)  # the delays were there
    # Whatever an order takes: the next one is begun before its scores are there.
    early = sum(claimed < scored for (_, _, scored), (claimed, _, _) in itertools.pairwise(orders))
    assert early >= 0.95 * (len(orders) - 1)
    (sitting,) = RunFolder(tmp_path / "runs" / "run").record["sittings"].values()
    seconds = sitting["seconds"]["sampler-0"]
    assert seconds.get("waiting for orders: scores of mine", 0.0) <= 0.05 * sum(seconds.values())


def test_ctrl_c_while_a_reward_loads_stops_at_once(model: Path, tmp_path: Path) -> None:
    words, loading = command(model, tmp_path, "pass"), tmp_path / "loading"
    with (tmp_path / "my_rewards.py").open("a") as file:
        file.write(f"    def __init__(self):\n        Path({str(loading)!r}).touch()\n        time.sleep(10**6)\n")
    with launched(*words, cwd=tmp_path) as run:
        wait_for("a reward that loads", loading.exists, run)
        run.process.send_signal(signal.SIGINT)
        output, errors = run.process.communicate(timeout=TIMEOUT_S)  # the reward loads for ever
    assert run.process.returncode == 130 and "stopped at once" in errors, (output, errors)
    assert not (tmp_path / "runs" / "run").exists()


@pytest.mark.slow
def test_a_reward_that_loads_for_long_is_named(model: Path, tmp_path: Path) -> None:
    words = command(model, tmp_path, "pass", "run.batches=1")
    with (tmp_path / "my_rewards.py").open("a") as file:
        file.write("    def __init__(self):\n        time.sleep(65)\n")
    done = launch(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "reward-mine-0: still loading" in done.stdout


@pytest.mark.slow
def test_the_advice_names_the_slow_reward_and_what_a_second_actor_gives(model: Path, tmp_path: Path) -> None:
    """Scoring an order takes six times as long as rolling it out, so a batch of four takes as long as its scores, on a
    machine that has other work as well. The throughput that the first run says to expect of a second actor is what a
    second run then has."""
    more = ["run.batches=8", "buffer.max_staleness=1"]
    delays = "policy.rollout:rollout:0.5,learner.learner:Learner.train:0.5"

    def run(name: str, *settings: str) -> tuple[dict[str, float], str]:
        """The last row that has numbers of the throughput, and what was printed."""
        done = launch(
            *command(model, tmp_path, "time.sleep(3)", *more, f"run.name={name}", *settings),
            cwd=tmp_path,
            delays=delays,
        )
        assert done.returncode == 0, done.stderr
        lines = (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()
        return [row for row in map(json.loads, lines) if "throughput/now" in row][-1], done.stdout

    before, printed = run("before")
    sentence = "the bottleneck is reward mine: raise rewards.mine.count from 1 to 2 for"
    assert sentence in printed
    assert sentence in (tmp_path / "runs" / "before" / "report.html").read_text()
    assert before["waiting/rewards.mine"] < 0.1 < 0.5 < before["waiting/samplers"]
    (sitting,) = json.loads((tmp_path / "runs" / "before" / "run.json").read_text())["sittings"].values()
    waits = {what: spent for what, spent in sitting["seconds"]["sampler-0"].items() if what.startswith("waiting")}
    records = read_counted(tmp_path / "runs" / "before" / "journal", before=ALL_EPOCHS)[0]
    begun = min(record["time"] for record in records if record["kind"] == "claimed")
    waits["waiting for orders: the learner"] -= begun - sitting["started"]  # until then it loads
    assert max(waits, key=lambda what: waits[what]) == "waiting for orders: scores of mine"
    after, _ = run("after", "rewards.mine.count=2")
    print(
        f"{before['throughput/now']:.2f}, expected {before['throughput/expected']:.2f}, {after['throughput/now']:.2f}"
    )
    # Counted in actors of the pool that are busy: what else the machine does makes orders dearer, in both runs.
    was, expected = (before[f"throughput/{when}"] / one_actor(before, 1) for when in ("now", "expected"))
    came = after["throughput/now"] / one_actor(after, 2)
    assert expected == pytest.approx(came, rel=0.15)
    assert came > 1.5 * was


def one_actor(row: dict[str, float], count: int) -> float:
    """Trajectories a second of one actor of the pool that never waits, by what scoring cost in that run."""
    return row["capacity/rewards.mine"] / count
