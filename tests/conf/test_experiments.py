"""The experiments of conf/experiment/: each is valid, and those of Stable Diffusion run with small models in the places
of the big ones, where nothing but paths and sizes differs."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from conf.load import experiments, load
from conf.validate import validate
from tests import vlm_models
from tests.clip_models import aesthetic_state, tiny_clip
from tests.pipelines import sd15_layout
from tests.running import ROOT, SMALL
from tests.running_local import run_local

PAIRS = ("compressibility", "incompressibility", "aesthetic", "alignment", "counting")
BASELINES = ("rwr", "rwr_sparse")  # of the paper, with Stable Diffusion alone
SIZES = [setting for setting in SMALL if not setting.startswith(("prompts.", "rewards."))]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small model of each kind that an experiment names."""
    folder = tmp_path_factory.mktemp("models")
    sd15_layout(folder / "sd15")
    tiny_clip(folder / "clip")
    torch.save(aesthetic_state(), folder / "head.pth")
    vlm_models.llava(folder / "llava")
    vlm_models.text_model(folder / "deberta", layers=40)
    return folder


def test_each_experiment_is_there_for_emoji_world_and_for_stable_diffusion() -> None:
    assert {*PAIRS, *(f"sd15_{name}" for name in PAIRS + BASELINES)} <= set(experiments())


@pytest.mark.parametrize("name", experiments())
def test_each_experiment_is_valid(name: str) -> None:
    validate(load([name]))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name.endswith("compressibility") else [])
        for name in PAIRS + BASELINES
    ],
)
def test_the_variant_for_stable_diffusion_runs_with_small_models_in_its_place(
    name: str, models: Path, tmp_path: Path
) -> None:
    paths = {
        "rwr": ["learner.optimizer_steps=2"],
        "rwr_sparse": ["learner.optimizer_steps=1"],
        "compressibility": [],
        "incompressibility": [],
        "aesthetic": [f"rewards.aesthetic.args.model={models}/clip", f"rewards.aesthetic.args.head={models}/head.pth"],
        "alignment": [
            f"rewards.caption.args.model={models}/llava",
            f"rewards.caption.args.text_model={models}/deberta",
        ],
        "counting": [f"rewards.vqa.args.model={models}/llava"],
    }[name]
    settings = [f"model.path={models}/sd15", f"run.dir={tmp_path}", "run.batches=1", *SIZES, *paths]
    done = run_local(f"sd15_{name}", *settings, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / f"sd15_{name}" / "trajectories").glob("*.parquet")
    rewards = pq.read_table(file)["reward"].to_numpy()
    assert len(rewards) == 8 and np.isfinite(rewards).all()
