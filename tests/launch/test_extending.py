"""docs/extending.md, done as it says: its files in an empty folder outside the checkout, and one run."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests import running

PAGE = running.ROOT / "docs" / "extending.md"
BLOCK = re.compile(r"^```(?:python|yaml)\n# (\S+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page's files, and its run."""
    folder = tmp_path_factory.mktemp("outside")
    for name, content in BLOCK.findall(PAGE.read_text(encoding="utf-8")):
        (folder / name).write_text(content, encoding="utf-8")
    subprocess.run([sys.executable, "make_model.py"], cwd=folder, check=True)
    done = running.launch("mine.yaml", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


def rows(folder: Path) -> list[dict]:
    tables = sorted((folder / "runs" / "mine" / "trajectories").glob("*.parquet"))
    return [row for table in tables for row in pq.read_table(table).to_pylist()]


def metrics(folder: Path) -> list[dict]:
    lines = (folder / "runs" / "mine" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_the_reward_scores_every_picture(folder: Path) -> None:
    assert len(rows(folder)) == 16
    assert all(-1.5 <= row["warmth"] <= 0.5 and row["reward"] == row["warmth"] for row in rows(folder))


def test_the_evaluation_set_has_prompts_rewards_and_steps_of_its_own(folder: Path) -> None:
    tables = sorted((folder / "runs" / "mine" / "evaluation").glob("*.unseen.*.parquet"))
    assert [table.name.split(".")[0] for table in tables] == ["v00000", "v00002"]
    for row in (row for table in tables for row in pq.read_table(table).to_pylist()):
        assert row["prompt"] in ("a hot day", "an icy lake") and 0 < row["contrast"] < 1
        assert row["reward"] == row["warmth"]
    assert all("contrast" not in row for row in rows(folder))
    assert any("evaluation/unseen/contrast/mean" in row for row in metrics(folder))


def test_the_objective_trains_with_its_own_arguments_and_curve(folder: Path) -> None:
    batches = [row for row in metrics(folder) if "loss" in row]
    assert len(batches) == 2
    assert all(row["sigma/power"] == 1.0 and row["ratio/mean"] == pytest.approx(1, abs=1e-3) for row in batches)
    assert all(row["grad_norm"] > 0 for row in batches)


def test_the_advantage_is_what_is_trained_on(folder: Path) -> None:
    for batch in (0, 1):
        advantages = sorted(row["advantage"] for row in rows(folder) if row["batch"] == batch)
        assert advantages == pytest.approx([-1 + 2 * rank / 7 for rank in range(8)])


def test_the_family_leaves_a_lora_that_diffusers_reads(folder: Path) -> None:
    assert (folder / "runs" / "mine" / "lora" / "pytorch_lora_weights.safetensors").is_file()


def test_nothing_was_written_into_the_checkout(folder: Path) -> None:
    assert {"my_reward.py", "my_objective.py", "my_advantage.py", "my_family.py"} <= {f.name for f in folder.iterdir()}
    assert not any((running.ROOT / name).exists() for name in ("my_reward.py", "pixels", "runs/mine"))
