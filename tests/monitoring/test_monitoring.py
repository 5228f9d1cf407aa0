"""The metrics log, and the display of a run."""

import io
import json
import math
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from buffer.orders import Evaluation
from conf.evaluations import FIRST
from monitoring.advice import Advice, Cores, advise
from monitoring.display import Display, Snapshot, sparkline
from monitoring.metrics import MetricsLog, evaluation_of, means_of

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
    log.add_evaluation(Evaluation(0, FIRST), {"reward/mean": -4.0})
    for batch in range(4):
        log.add_batch(batch, ROW)
    log.add_evaluation(Evaluation(4, FIRST), {"reward/mean": -3.0})
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


def curves(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard draws: (step, value) by tag."""
    events = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    return {tag: [(point.step, point.value) for point in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_an_evaluation_has_curves_of_its_own(tmp_path: Path) -> None:
    """Whatever its keys are: none of them is a batch's."""
    log = MetricsLog(tmp_path, trained=0)
    log.add_evaluation(Evaluation(0, FIRST), {"reward/mean": -4.0, "reward/std": 0.25, "reward/clip": 1.0, "new": 2.0})
    log.add_batch(0, {**ROW, "reward/clip": 0.5, "new": 3.0})
    log.add_evaluation(Evaluation(1, FIRST), {"reward/mean": -3.5, "reward/std": 0.75, "reward/clip": 1.5, "new": 2.5})
    log.add_batch(1, {**ROW, "reward/clip": 0.75, "new": 3.5})
    log.close()
    drawn = curves(tmp_path)
    assert drawn["reward/mean"] == [(0, -3.0), (1, -3.0)]
    assert drawn["evaluation/train/reward/mean"] == [(0, -4.0), (1, -3.5)]
    assert drawn["evaluation/train/reward/std"] == [(0, 0.25), (1, 0.75)]
    for key in ("reward/clip", "new"):
        assert len(drawn[key]) == len(drawn[f"evaluation/train/{key}"]) == 2
    keys = ["evaluation/train/reward/mean", "reward/mean"]  # the file's are those that are drawn
    assert [row[key] for row, key in zip(rows(tmp_path), keys * 2, strict=True)] == [-4.0, -3.0, -3.5, -3.0]


def test_the_curves_of_a_resumed_run_are_those_of_its_rows(tmp_path: Path) -> None:
    """Batches from the recovery point on are trained again; the evaluation of its version is not made again."""
    log = MetricsLog(tmp_path, trained=0)
    for batch in range(4):
        log.add_evaluation(Evaluation(batch, FIRST), {"reward/mean": -4.0 + batch})
        log.add_batch(batch, ROW)
    log.close()
    log = MetricsLog(tmp_path, trained=2)
    log.add_batch(2, {**ROW, "reward/mean": 7.0})
    log.add_evaluation(Evaluation(3, FIRST), {"reward/mean": 8.0})
    log.close()
    drawn = curves(tmp_path)
    assert drawn["reward/mean"] == [(0, -3.0), (1, -3.0), (2, 7.0)]
    assert drawn["evaluation/train/reward/mean"] == [(0, -4.0), (1, -3.0), (2, -2.0), (3, 8.0)]


def test_a_number_that_is_none_is_left_out_of_its_row(tmp_path: Path) -> None:
    """JSON has no NaN, and a program that reads the rows as JSON stops at one."""
    log = MetricsLog(tmp_path, trained=0)
    log.add_batch(0, {**ROW, "ratio/gap": math.nan, "loss": math.inf, "kl/base": -math.inf})
    log.add_evaluation(Evaluation(0, FIRST), {"reward/mean": math.nan})
    log.close()
    batch, evaluation = rows(tmp_path)
    assert not {"ratio/gap", "loss", "kl/base"} & set(batch) and "evaluation/train/reward/mean" not in evaluation
    assert evaluation["version"] == 0


def test_what_is_shown_of_a_row_is_every_measure_once() -> None:
    own = {"version": 3.0, "evaluation/held_out/bright/mean": 0.5, "evaluation/held_out/pictures": 4.0}
    assert evaluation_of(own) == (3, "held_out")
    assert means_of(Evaluation(3, "held_out"), own, ["bright"]) == {"bright": 0.5}
    trained = {"evaluation/held_out/reward/mean": -1.0, "evaluation/held_out/reward/std": 0.1} | own
    assert means_of(Evaluation(3, "held_out"), trained, ["bright"]) == {"reward": -1.0, "bright": 0.5}
    alone = trained | {"evaluation/held_out/bright/mean": -1.0, "evaluation/held_out/diversity/mean": 0.2}
    assert means_of(Evaluation(3, "held_out"), alone, ["bright"]) == {"reward": -1.0, "diversity": 0.2}
    equal = alone | {"evaluation/held_out/diversity/mean": -1.0}  # by chance, and it is said all the same
    assert means_of(Evaluation(3, "held_out"), equal, ["bright"]) == {"reward": -1.0, "diversity": -1.0}


def snapshot(trained: int, notes: list[str]) -> Snapshot:
    return Snapshot(
        trained=trained,
        rows=[{"batch": batch, "time": 100.0 + 5 * batch, "images_per_s": 9.0, **ROW} for batch in range(trained)],
        evaluations={Evaluation(0, FIRST): {"reward": -4.0}},
        waiting={"sampler-0": 0.5},
        orders={"open": 4},
        evaluating=0,
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
    found = advise(seconds, 16 * max(rollout_s, scoring_s), 4, counts, 64, 16, 1, Cores())
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


def test_a_sparkline_leaves_out_what_is_no_number() -> None:
    assert sparkline([math.nan, 0.0, math.inf, 0.5, 1.0, -math.inf]) == "▁▄█"
    assert sparkline([]) == sparkline([math.nan]) == ""


# ---- a run that goes on


def resumed(trained: int, earlier: int, **changes: Any) -> Snapshot:
    """`earlier` rows were there when this start began."""
    return replace(
        snapshot(trained, []), earlier=earlier, earlier_evaluations=frozenset({Evaluation(0, FIRST)}), **changes
    )


def test_a_resumed_run_prints_only_what_is_new_and_where_it_goes_on() -> None:
    evaluations = {
        Evaluation(0, FIRST): {"reward": -4.0},
        Evaluation(5, FIRST): {"reward": -3.0},
        Evaluation(5, "held_out"): {"bright": 0.5, "sharp": 2.0},
    }
    lines = shown(False, resumed(4, 4), resumed(5, 4), resumed(5, 4, evaluations=evaluations)).splitlines()
    assert lines[0] == "mine goes on: 4 of 10 batches are trained"
    assert [line.split()[1] for line in lines if line.startswith("batch")] == ["5/10"]
    assert [line for line in lines if line.startswith("evaluation")] == [
        "evaluation at version 5 on held_out: bright 0.5000, sharp 2.0000",
        "evaluation at version 5: reward -3.0000",
    ]
    assert len(lines) == 4


def test_a_batch_of_before_whose_row_is_new_is_printed() -> None:
    """The driver died between the training of a batch and its row."""
    lines = shown(False, resumed(4, 3)).splitlines()
    assert [line.split()[1] for line in lines if line.startswith("batch")] == ["4/10"]


def test_a_run_that_died_before_its_first_batch_says_that_it_goes_on() -> None:
    assert shown(False, resumed(0, 0)).splitlines() == ["mine goes on: 0 of 10 batches are trained"]
    assert shown(False, snapshot(0, [])).splitlines() == ["evaluation at version 0: reward -4.0000"]


def test_in_a_terminal_a_resumed_run_says_it_too_and_its_curve_is_whole() -> None:
    text = shown(True, resumed(4, 4))
    assert "mine goes on: 4 of 10 batches are trained" in text
    assert "▁▁▁▁" in text


def test_the_time_between_two_starts_is_no_batch_of_time() -> None:
    """The night that a run stood still is neither a batch's duration nor time that has run off the rest."""
    night, now = 8 * 3600.0, time.time()
    old = [{"batch": batch, "time": now - night - 60.0 * (3 - batch), **ROW} for batch in range(4)]
    fresh = [{"batch": 4, "time": now - 60.0, **ROW}, {"batch": 5, "time": now, **ROW}]
    for rows, trained, minutes in ((old, 4, 6), ([*old, fresh[0]], 5, 4), ([*old, *fresh], 6, 4)):
        text = shown(True, resumed(trained, 4, rows=rows))
        left = re.search(r"batches, (\d+) min (\d+) s left", text)
        assert left, text
        seconds = 60 * int(left[1]) + int(left[2])
        assert seconds == pytest.approx(60 * minutes, abs=20)


# ---- numbers that are not there


def test_what_is_left_is_said_once_it_is_known() -> None:
    first, second = shown(False, snapshot(1, [])), shown(False, snapshot(2, []))
    assert "left" not in first + shown(True, snapshot(0, [])) + shown(True, snapshot(1, []))
    assert "left" in second.splitlines()[-1]


@pytest.mark.parametrize("terminal", [False, True])
def test_no_number_is_shown_as_minus_zero(terminal: bool) -> None:
    row = {**ROW, "reward/mean": -1e-9, "reward/std": 0.0, "kl/base": -1e-9, "images_per_s": 0.0, "clip_fraction": 0.0}
    now = replace(
        snapshot(1, []),
        rows=[{"batch": 0, "time": 100.0, **row}],
        evaluations={Evaluation(0, FIRST): {"reward": -1e-9}},
    )
    assert not re.search(r"(?<!\w)-0\.?0*(?![\d.e])", shown(terminal, now))


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("missing", [key for key in ROW if key != "trajectories"])
def test_any_number_may_be_missing(terminal: bool, missing: str) -> None:
    now = snapshot(2, [])
    for row in now.rows:
        del row[missing]
    text = shown(terminal, now)
    assert "nan" not in text and ("–" in text or (missing == "age/mean" and not terminal))  # which a line leaves out


@pytest.mark.parametrize("terminal", [False, True])
def test_an_evaluation_of_which_every_picture_was_set_aside_is_said_in_words(terminal: bool) -> None:
    text = shown(terminal, replace(snapshot(1, []), evaluations={Evaluation(0, FIRST): {}}))
    assert "no picture has a reward" in text and "nan" not in text


@pytest.mark.parametrize("terminal", [False, True])
def test_a_run_without_batches_workers_or_orders_is_shown(terminal: bool) -> None:
    now = replace(snapshot(0, []), evaluations={}, waiting={}, orders={}, set_aside=0)
    shown(terminal, now)
