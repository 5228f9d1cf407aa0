"""The LoRA that a run hands out, in programs that know nothing of this project: they draw the run's own pictures.

The installed diffusers in the default suite; `make test-other-diffusers` the one of before LoRA metadata, which takes
alpha for the rank, with transformers 4.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from conf.load import from_file
from tests.run_files import stored_picture
from tests.running import EXPERIMENT, ROOT, SMALL
from tests.running_local import run_local

OTHER = ROOT / "build" / "other-diffusers" / "venv" / "bin" / "python"
# The experiment's own sampling, rank 16 and alpha 32; a rate at which two batches change pictures for anyone to see.
SETTINGS = [setting for setting in SMALL if not setting.startswith(("sampling.", "learner.lr="))]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("elsewhere")
    done = run_local(
        EXPERIMENT, *SETTINGS, "learner.lr=2e-2", "run.batches=2", "run.name=run", f"run.dir={folder}", cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return folder / "run"


def drawn(python: str | Path, run: Path, lora: Path | None, tmp_path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The last evaluation's pictures, the run's own and by that interpreter's diffusers: float [n, H, W, 3]."""
    config = from_file(run / "config.yaml")
    assert (config.model.lora.rank, config.model.lora.alpha) == (16, 32.0)
    (file,) = (run / "evaluation").glob("v00002*")
    rows = pq.read_table(file).to_pylist()
    job = {
        "pipeline": str(ROOT / config.model.path),
        "lora": lora and str(lora),
        "steps": config.sampling.steps,
        "guidance": config.sampling.guidance,
        "eta": config.sampling.eta,
        "pairs": [[row["prompt"], row["seed"]] for row in rows],
    }
    (tmp_path / "job.json").write_text(json.dumps(job), encoding="utf-8")
    program = [
        str(python),
        str(ROOT / "tests" / "policy" / "drawing.py"),
        str(tmp_path / "job.json"),
        str(tmp_path / "out.npy"),
    ]
    done = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    own = np.stack([stored_picture(run, row["trajectory_id"]) for row in rows])
    return own.astype(float), np.load(tmp_path / "out.npy").astype(float)


@pytest.mark.parametrize(
    "python",
    [
        pytest.param(sys.executable, id="the installed diffusers"),
        pytest.param(OTHER, id="diffusers 0.31", marks=pytest.mark.other_diffusers),
    ],
)
def test_its_lora_draws_the_runs_own_pictures(run: Path, tmp_path: Path, python: str | Path) -> None:
    own, base = drawn(python, run, None, tmp_path)
    assert np.abs(own - base).mean() > 5  # the LoRA shows
    own, made = drawn(python, run, run / "lora", tmp_path)
    difference = np.abs(own - made).mean()
    print(f"mean difference {difference:.5f} of 255; from the base model's pictures {np.abs(own - base).mean():.1f}")
    assert difference < 1
