"""The verdict of the kill matrix (tests/chaos) can fail: on run folders that were doctored in each way it has to see.
And its cases: what is drawn from a seed covers every role, signal and bound, and is drawn again from the same seed."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from buffer.buffer import TrajectoryBuffer
from buffer.journal import Journal
from buffer.run_folder import RunFolder
from buffer.state import Record
from conf.load import load
from conf.resume import save_config
from tests.buffer_toy import PLAN, buffer, finish, roll_out, score, start
from tests.chaos.blow import CELLS, ROLES, SIGNALS, Timeline, draw, timeline
from tests.chaos.verdict import WEIGHTS, newest_recovery_point, verdict

BATCHES = 3


def toy(run_dir: Path) -> TrajectoryBuffer:
    return buffer(run_dir, batches=BATCHES, max_staleness=1, keep_batches=BATCHES)


def save_weights(run_dir: Path, value: float) -> None:
    """What a learner leaves besides rows; the toy's leaves empty folders."""
    point = run_dir / newest_recovery_point(RunFolder(run_dir).history)
    for name in WEIGHTS:
        save_file({"weight": torch.tensor([1.0, value])}, point / name)
    (point / "state.json").write_text(json.dumps({"advantage": {}, "counters": {}, "metrics": {}, "files": value}))
    (run_dir / "lora").mkdir(exist_ok=True)
    shutil.copyfile(point / WEIGHTS[0], run_dir / "lora" / WEIGHTS[0])


def save_settings(run_dir: Path, max_staleness: int) -> None:
    settings = {
        "run.name": run_dir.name,
        "run.dir": run_dir.parent,
        "run.batches": BATCHES,
        "buffer.batch_size": PLAN.batch_size,
        "buffer.order_size": PLAN.order_size,
        "buffer.max_staleness": max_staleness,
        "evaluation.count": PLAN.sets[0].count,
    }
    save_config(run_dir, load(["compressibility", *(f"{k}={v}" for k, v in settings.items())]), ["a cat"])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run whose buffer died once, of which nothing is wrong, and with what it had done before."""
    folder = tmp_path_factory.mktemp("whole")
    first = toy(folder / "run")
    start(first)
    for _ in range(4):
        roll_out(first)
    score(first)
    score(first)
    first.close()
    (folder / "before.json").write_text(json.dumps(RunFolder(folder / "run").history))
    second = toy(folder / "run")
    finish(second)
    second.close()
    save_weights(folder / "run", 0.5)
    return folder


@pytest.fixture
def run_dir(whole: Path, tmp_path: Path) -> Path:
    """A copy of it, to be spoilt."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    save_settings(tmp_path / "run", max_staleness=1)
    return tmp_path / "run"


def before(run_dir: Path) -> list[Record]:
    records: list[Record] = json.loads((run_dir.parent / "before.json").read_text())
    return records


def edit_rows(run_dir: Path, edit: Callable[[pa.Table], pa.Table]) -> None:
    """Of the first batch."""
    file = min((run_dir / "trajectories").iterdir())
    pq.write_table(edit(pq.read_table(file)), file)


def set_first(column: str, value: object) -> Callable[[pa.Table], pa.Table]:
    def edit(table: pa.Table) -> pa.Table:
        values = [value, *table[column].to_pylist()[1:]]
        place = table.column_names.index(column)
        return table.set_column(place, column, pa.array(values, table.schema.field(column).type))

    return edit


def again(run_dir: Path, kind: str, **changed: object) -> None:
    """Another epoch that makes something of the first batch once more."""
    record = next(r for r in RunFolder(run_dir).history if r["kind"] == kind and r.get("batch", 0) >= 0)
    more = Journal(run_dir / "journal")
    seals = {str(epoch): size for epoch, size in more.seals.items()}
    more.append(({"kind": "opened", "epoch": more.epoch, "seals": seals}, record | changed))
    more.close()


def test_a_run_of_which_nothing_is_wrong(run_dir: Path) -> None:
    assert sum(record["kind"] == "scored" for record in before(run_dir)) == 2
    assert verdict(run_dir, before(run_dir)) == []
    assert verdict(run_dir, before(run_dir), undisturbed=run_dir) == []


def copy_rows(run_dir: Path) -> None:
    file = min((run_dir / "trajectories").iterdir())
    shutil.copyfile(file, file.with_name(file.name.replace("b00000", "b00009")))


def remove_scores(run_dir: Path) -> None:
    (run_dir / next(r["path"] for r in before(run_dir) if r["kind"] == "scored")).unlink()


@pytest.mark.parametrize(
    ("doctor", "sentence"),
    [
        (lambda run: edit_rows(run, lambda table: table.slice(1)), "trajectory 0, which size had scored, is lost"),
        (lambda run: edit_rows(run, set_first("size", 1.0)), "another score of size than before"),
        (remove_scores, "another score of size than before"),
        (lambda run: again(run, "rolled_out", images=["another", "another"]), "that size had scored were lost"),
        (lambda run: again(run, "rolled_out"), "was rolled_out 2 times"),
        (lambda run: again(run, "scored"), "was scored 2 times"),
        (lambda run: again(run, "claimed"), "claimed again after it was rolled out"),
        (lambda run: again(run, "trained"), "was trained 2 times"),
        (copy_rows, "trajectory 0 was trained 2 times"),
        (lambda run: save_settings(run, max_staleness=0), "was trained at age 1"),
        (lambda run: edit_rows(run, set_first("age", 1)), "was trained at age 0, noted as 1"),
        (lambda run: edit_rows(run, set_first("policy_digest", "another")), "which are not version 0"),
        (lambda run: edit_rows(run, set_first("advantage", float("nan"))), "advantage nan"),
        (lambda run: save_weights(run, float("inf")), "not finite in weight"),
    ],
)
def test_what_is_wrong_is_seen(doctor: Callable[[Path], None], sentence: str, run_dir: Path) -> None:
    doctor(run_dir)
    assert sentence in "; ".join(verdict(run_dir, before(run_dir)))


def test_a_run_that_did_not_end(tmp_path: Path) -> None:
    start(toy(tmp_path / "run"))
    save_settings(tmp_path / "run", max_staleness=1)
    assert verdict(tmp_path / "run", []) == ["the run did not end: batches [0, 1, 2] are not trained"]


def test_bits_that_differ_from_the_undisturbed_run(run_dir: Path) -> None:
    other = run_dir.with_name("other")
    shutil.copytree(run_dir, other)
    save_weights(run_dir, 0.5 + 2**-24)
    edit_rows(run_dir, set_first("advantage", 0.25))
    found = verdict(run_dir, before(run_dir), undisturbed=other)
    assert [sentence.split(" ")[0] for sentence in found] == [*WEIGHTS, "the"] and "rows" in found[-1]


def test_the_cases_of_a_seed_cover_every_cell_half_of_them_asynchronous() -> None:
    cases = [draw(seed=3, number=number) for number in range(60)]
    assert cases == [draw(seed=3, number=number) for number in range(60)]
    assert Counter((case.role, case.signal) for case in cases) == dict.fromkeys(CELLS, 5)
    assert len(CELLS) == len(ROLES) * len(SIGNALS) == 12
    assert Counter(case.max_staleness for case in cases) == {0: 30, 2: 30}
    for cell in CELLS:  # each at both bounds, at steps of its work and at any moment
        own = [case for case in cases if (case.role, case.signal) == cell]
        assert {case.max_staleness for case in own} == {0, 2}
        assert len({(case.step, case.share) for case in own}) == 5
    assert cases[0].share not in {draw(seed=4, number=number).share for number in range(60)}


def test_a_moment_is_found_again_by_lines_of_the_journal(run_dir: Path) -> None:
    line = Timeline(times=[0.0, 10.0, 12.0, 20.0, 30.0], first=10.0, last=30.0)
    assert line.moment(0.0) == (2, 0.0)
    assert line.moment(0.25) == (3, 3.0)
    assert line.moment(0.75) == (4, 5.0)
    own = timeline(run_dir)
    assert len(own.times) == len((run_dir / "journal" / "epoch-000001.jsonl").read_text().splitlines())
