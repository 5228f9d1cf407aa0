"""The study of old data: its data are as old as it says, and its table is of its numbers."""

import json
import xml.etree.ElementTree
from pathlib import Path

import pytest

from benchmarks import staleness, staleness_report
from benchmarks.staleness import CELLS, Cell, finished, run, settings
from conf.load import load
from conf.validate import validate
from tests.pipelines import tiny_pipeline
from tests.running import SMALL

BATCHES = 3


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The study's cells with a tiny model and few pictures."""
    path = f"model.path={tiny_pipeline(tmp_path / 'model')}"
    sizes = [*SMALL, "learner.lr=1e-2", "evaluation.every=3"]
    monkeypatch.setattr(staleness, "SETTINGS", ["compressibility", path, f"run.batches={BATCHES}", *sizes])


def test_every_cell_is_a_valid_run() -> None:
    assert len(set(CELLS)) == 27
    for cell in CELLS[:9]:  # seed 0
        validate(load(settings(cell)))


def test_batch_u_is_rolled_out_at_version_u_minus_k(small: None) -> None:
    """Until batch k all data are of version 0, which no objective or k can change; batch k + 1 is of version 1."""
    runs = {k: run(Cell(0, k, k == 2)) for k in (0, 1, 2)}
    rewards = {k: [batch["reward/mean"] for batch in line["batches"]] for k, line in runs.items()}
    for k, line in runs.items():
        assert [batch["age/max"] for batch in line["batches"]] == [min(u, k) for u in range(BATCHES)]
        assert [batch["ratio/max_abs_log"] < 1e-4 for batch in line["batches"]] == [
            min(u, k) == 0 for u in range(BATCHES)
        ]
        assert list(line["evaluations"]) == [0, 3]
    assert rewards[0][:1] == rewards[1][:1] and rewards[0][1] != rewards[1][1]
    assert rewards[1][:2] == rewards[2][:2] and rewards[1][2] != rewards[2][2]
    assert runs[0]["evaluations"][0] == runs[2]["evaluations"][0]


def _line(cell: Cell, after: list[float]) -> str:
    batch = {"kl/base": 7.0, "clip_fraction": 0.25, "ess/step": 0.5}
    evaluations = {"0": [1.0, 3.0], "30": after}
    line = {"settings": settings(cell), "evaluations": evaluations, "batches": [batch], "seconds": 1, "machine": "here"}
    return json.dumps({**cell._asdict(), **line}) + "\n"


def test_the_table_gives_means_and_errors_over_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Base rewards 1 and 3 have std √2. At k = 0 each pair gains 1 + seed; at k = 2 plain one half of that less."""
    results, drawing = tmp_path / "results.jsonl", tmp_path / "figure.svg"
    with results.open("w") as file:
        for cell in CELLS:
            gain = 1 + cell.seed - 0.5 * (cell.max_staleness == 2 and not cell.decoupled)
            file.write(_line(cell, [1 + gain, 3 + gain]))
        file.write('{"seed": 0, "max')  # cut off by a crash
    study = staleness_report.grouped(finished(results))
    rows = staleness_report.table(study).splitlines()
    assert "| 0 | either | +1.41 ± 0.41 |  | 7 ± 0 | 0.25 ± 0.00 | 0.50 ± 0.00 |" in rows
    assert any(row.startswith("| 2 | plain | +1.06 ± 0.41 | -0.35 ± 0.00 |") for row in rows)
    assert any(row.startswith("| 2 | decoupled | +1.41 ± 0.41 | +0.00 ± 0.00 |") for row in rows)
    monkeypatch.setattr("sys.argv", ["report", str(results), "--figure", str(drawing)])
    staleness_report.main()
    circles = xml.etree.ElementTree.parse(drawing).iter("{http://www.w3.org/2000/svg}circle")
    assert len(list(circles)) == 2 * 5 + 2 * 5 * 2  # by k, and two evaluations of each curve


def test_results_of_other_settings_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "results.jsonl").write_text(_line(CELLS[0], [1.0, 3.0]))
    monkeypatch.setattr(staleness, "SETTINGS", [*staleness.SETTINGS, "learner.lr=1e-4"])
    with pytest.raises(SystemExit, match="other settings"):
        finished(tmp_path / "results.jsonl")
