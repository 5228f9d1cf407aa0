"""The metrics log, and the display of a run."""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from monitoring.advice import Advice, advise
from monitoring.display import Display, Snapshot, sparkline
from monitoring.metrics import MetricsLog

ROW = {
    "reward/mean": -3.0,
    "reward/std": 0.5,
    "age/mean": 0.5,
    "age/max": 1.0,
    "ratio/gap": 1e-6,
    "clip_fraction": 0.25,
    "kl/base": 2.0,
    "trajectories": 64.0,
}


def rows(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_rows_beyond_the_recovery_point_and_a_torn_last_line_are_cut_off(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, trained=0)
    log.add_evaluation(0, {"reward/mean": -4.0})
    for batch in range(4):
        log.add_batch(batch, ROW)
    log.add_evaluation(4, {"reward/mean": -3.0})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"batch": 4, "rew')
    log = MetricsLog(tmp_path, trained=2)
    assert [row["batch"] for row in rows(tmp_path) if "batch" in row] == [0, 1]
    assert [row["version"] for row in rows(tmp_path) if "version" in row] == [0]
    log.add_batch(1, {**ROW, "reward/mean": 9.0})  # published again: its row is there already
    log.add_batch(2, ROW)
    log.close()
    assert [(row["batch"], row["reward/mean"]) for row in rows(tmp_path) if "batch" in row] == [
        (0, -3.0),
        (1, -3.0),
        (2, -3.0),
    ]
    assert rows(tmp_path)[-1]["trajectories"] == 64.0
    assert list((tmp_path / "tensorboard").iterdir())


def snapshot(trained: int, notes: list[str]) -> Snapshot:
    return Snapshot(
        trained=trained,
        rows=[{"batch": batch, "time": 100.0 + 5 * batch, "images_per_s": 9.0, **ROW} for batch in range(trained)],
        evaluations={0: -4.0},
        waiting={"sampler-0": 0.5},
        orders={"open": 4},
        set_aside=2,
        restarts=len(notes),
        notes=notes,
    )


def advice(rollout_s: float, scoring_s: float) -> Advice:
    """Of four batches of four orders, with orders that take so long."""
    seconds = {
        "sampler-0.0": {"rolling out": 16 * rollout_s, "waiting for orders: scores of clip": 9.0},
        "reward-clip-0.0": {"scoring": 16 * scoring_s},
        "learner-0.0": {"training": 0.1},
    }
    counts = {"samplers": 1, "rewards.clip": 1, "learner": 1}
    found = advise(seconds, 16 * max(rollout_s, scoring_s), 4, counts, 64, 16, max_staleness=1)
    assert found is not None
    return found


def shown(terminal: bool, *snapshots: Snapshot) -> str:
    output = io.StringIO()
    console = Console(file=output, force_terminal=terminal, width=160, highlight=False)
    with Display("mine", batches=10, console=console) as display:
        for now in snapshots:
            display.show(now)
    return output.getvalue()


def test_without_a_terminal_every_batch_and_every_note_is_one_line_once() -> None:
    first, second = snapshot(1, []), snapshot(3, ["sampler-0.0 died (killed); another takes its place in 1 s"])
    lines = shown(False, first, first, second, second).splitlines()
    assert [line.split()[1] for line in lines if line.startswith("batch")] == ["1/10", "2/10", "3/10"]
    assert sum("died" in line for line in lines) == 1
    assert sum(line.startswith("evaluation at version 0") for line in lines) == 1
    assert "\x1b" not in "".join(lines)


@pytest.mark.parametrize("terminal", [False, True])
def test_a_batch_without_fresh_data_has_no_gap_to_show(terminal: bool) -> None:
    now = snapshot(1, [])
    for key in ("ratio/gap", "clip_fraction", "kl/base", "images_per_s"):
        del now.rows[0][key]
    assert "–" in shown(terminal, now)


def test_in_a_terminal_there_is_a_panel() -> None:
    text = shown(True, snapshot(3, ["sampler-0.0 died"]))
    for says in ("mine", "3 of 10", "clipped 25.0%", "sampler-0 50%", "2 pictures set aside", "sampler-0.0 died"):
        assert says in text, says


def test_advice_is_printed_when_it_changes_and_stands_in_the_panel() -> None:
    first, again, other = (
        replace(snapshot(trained, []), advice=advice(*at))
        for trained, at in enumerate([(1.0, 2.0), (1.1, 2.0), (1.0, 0.1)])
    )
    lines = [line for line in shown(False, first, again, other).splitlines() if "bottleneck" in line]
    assert [line.split(" for ")[0] for line in lines] == [
        "the bottleneck is reward clip: raise rewards.clip.count from 1 to 2",
        "the bottleneck is the samplers: raise samplers.count from 1 to 2",
    ]
    panel = shown(True, first)
    for says in ("reward clip: raise rewards.clip.count from 1 to 2", "samplers: scores of clip"):
        assert says in panel, says


def test_a_sparkline_runs_from_the_lowest_to_the_highest() -> None:
    assert sparkline([0.0, 0.5, 1.0]) == "▁▄█"
    assert sparkline([2.0, 2.0]) == "▁▁"
