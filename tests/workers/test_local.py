"""workers/local.py: a whole run without Ray. tests/launch/test_main_job.py has the same one with it."""

import html
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from safetensors import safe_open

from buffer.run_folder import RunFolder
from buffer.schema import tensors_of
from evaluation.guard import judge
from evaluation.history import history
from policy.policy import Policy
from policy.rollout import rollout
from policy.source import WEIGHT_NAME
from report.evaluations import by_scale
from tests.run_files import assert_same_run
from tests.running import small, user_reward
from tests.running_local import kill_local, run_local
from workers.sampler import policies_of


def test_it_goes_on_from_where_it_was_ended(model: Path, undisturbed: Path, tmp_path: Path) -> None:
    for batches in (2, 4):
        done = run_local(*small(model, "run", f"run.batches={batches}"), cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert_same_run(undisturbed, tmp_path / "runs" / "run")


@pytest.mark.parametrize(
    "at",
    [
        pytest.param("workers.sampler:rollout:11", id="during rollout"),
        pytest.param("workers.scorer:score_order:11", id="during scoring"),
        pytest.param("learner.update:Updater._optimizer_step:6", id="between two optimizer steps of a batch"),
        pytest.param("workers.trainer:write_batch:3", id="between the recovery point and its registration"),
    ],
)
def test_kill_9_and_the_same_command_again(at: str, model: Path, undisturbed: Path, tmp_path: Path) -> None:
    """Four batches are two batches, kill -9 and the rest, wherever it strikes."""
    command = small(model, "run", "run.batches=4")
    kill_local(*command, cwd=tmp_path, at=at)
    assert not (tmp_path / "runs" / "run" / "report.html").exists()
    done = run_local(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert_same_run(undisturbed, tmp_path / "runs" / "run")


def test_a_run_that_stops_says_what_its_time_was_spent_on(model: Path, tmp_path: Path) -> None:
    failing = "rewards.compressibility.path=tests.studies.failing:Failing"
    done = run_local(*small(model, "run", failing), cwd=tmp_path)
    assert done.returncode == 2 and "max_failed_share" in done.stderr, done.stderr
    (sitting,) = RunFolder(tmp_path / "runs" / "run").sittings
    assert sitting["seconds"]["sampler-0"]["rolling out"] > 0 and sitting["ended"] > sitting["started"]


def test_what_a_reward_does_to_its_process_is_not_done_to_the_run(
    model: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """It switches gradients off, as programs do that only look at pictures, and goes to another folder."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "rude_rewards.py").write_text(f"""
import os
import torch
from rewards.jpeg import JpegCompressibility

class Rude(JpegCompressibility):
    def __call__(self, images, prompts):
        torch.set_grad_enabled(False)
        torch.set_default_dtype(torch.float64)
        os.chdir({str(tmp_path / "elsewhere")!r})
        return super().__call__(images, prompts)
""")
    rude = "rewards.compressibility.path=rude_rewards:Rude"
    done = run_local(*small(model, "run", "run.batches=4", rude), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    mine, theirs = (run.batches[-1] for run in (RunFolder(tmp_path / "runs" / "run"), RunFolder(undisturbed)))
    assert mine["loss"] == theirs["loss"] and not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["prompts.list=[a cat,A cat]"], "Prompts 1 ('a cat') and 2 ('A cat') are the same to the model"),
        (["evaluation.sets.h.prompts.list=[a cat,A cat]"], "evaluation.sets.h: Prompts 1 ('a cat') and 2"),
        (["evaluation.sets.h.sampling.steps=1000"], "evaluation.sets.h: sampling.steps=1000 is impossible"),
        (["run.mirror=file:///tmp/mirror"], "only launch.py keeps a mirror, so set run.mirror=null"),
    ],
)
def test_what_launch_refuses_is_refused_here(words: list[str], says: str, model: Path, tmp_path: Path) -> None:
    done = run_local(*small(model, "run", *words), cwd=tmp_path)
    assert done.returncode == 2 and says in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert not (tmp_path / "runs" / "run").exists()


OF_A_USER = ["learner.objective=tests.workers.clean_objective:Regression", "learner.objective_args={timestep: 500}"]


NFT = ["learner.objective=nft"]


@pytest.mark.parametrize(
    ("words", "curve", "has_kl"),
    [(OF_A_USER, "error", False), (NFT, "denoising/error", True), ([*NFT, "sampling.eta=0"], "denoising/error", False)],
    ids=["of a user", "nft", "nft without noise in the steps"],
)
def test_an_objective_on_finished_pictures_alone_is_trained_and_goes_on(
    model: Path, tmp_path: Path, words: list[str], curve: str, has_kl: bool
) -> None:
    """Samplers then store the last latents, no log-probs; nothing of policy gradients is measured."""
    words = [*words, "learner.advantage=by_group", "buffer.keep_batches=3", "evaluation.every=3"]
    for name, until in (("whole", 3), ("parts", 2), ("parts", 3)):
        done = run_local(*small(model, name, f"run.batches={until}", *words), cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    whole = tmp_path / "runs" / "whole"
    assert_same_run(whole, tmp_path / "runs" / "parts")

    config = RunFolder(whole).config
    sampler = Policy.load(config.model, config.sampling, config.run.seed, "cpu", trainable=False)
    rows = {row["trajectory_id"]: row for row in RunFolder(whole).trajectories().to_pylist()}
    seen = 0
    for file in (whole / "tensors").glob("b*.latents.*.arrow"):
        table = pa.ipc.open_file(file).read_all()
        assert table.column_names == ["trajectory_id", "latents"]
        latents = tensors_of(table)["latents"]
        assert latents.shape == (2, 1, 4, 8, 8)
        own = [rows[trajectory_id] for trajectory_id in table["trajectory_id"].to_pylist()]
        if own[0]["policy_version"] == 0:
            made = rollout(sampler, [row["prompt"] for row in own], [row["seed"] for row in own])
            assert np.array_equal(latents, made.latents[:, -1:])
            seen += 1
    assert seen

    batches = RunFolder(whole).batches
    assert len(batches) == 3
    for row in batches:
        assert row[curve] > 0 and row["loss"] > 0 and row["grad_norm"] > 0 and row["non_finite_steps"] == 0
        assert not [key for key in row if key.startswith(("ratio/", "clip_fraction", "ess/", "kl/step"))]
        assert ("kl/base" in row) is has_kl
    with safe_open(whole / "lora" / WEIGHT_NAME, framework="np") as file:
        assert any(file.get_tensor(key).any() for key in file.keys() if "lora_B" in key)  # noqa: SIM118
    assert (whole / "report.html").exists()


def test_groups_start_from_one_noise_are_compared_among_themselves_and_go_on(model: Path, tmp_path: Path) -> None:
    words = ["buffer.group_size=4", "sampling.same_noise=true", "learner.advantage=by_group", "learner.train_share=0.5"]
    words += ["learner.advantage_args.std=batch", "buffer.keep_batches=3", "evaluation.every=3"]
    for name, until in (("whole", 3), ("parts", 2), ("parts", 3)):
        done = run_local(*small(model, name, f"run.batches={until}", *words), cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path / "runs" / "whole", tmp_path / "runs" / "parts")
    run = RunFolder(tmp_path / "runs" / "whole")
    rows = {row["trajectory_id"]: row for row in run.trajectories().to_pylist()}
    starts: dict[int, set[bytes]] = {}
    seen: dict[int, set[bytes]] = {}
    for file in (run.path / "tensors").glob("b*.latents.*.arrow"):  # two trajectories each, half a group
        table = pa.ipc.open_file(file).read_all()
        for trajectory_id, path in zip(table["trajectory_id"].to_pylist(), tensors_of(table)["latents"], strict=True):
            starts.setdefault(trajectory_id // 4, set()).add(path[0].tobytes())
            seen.setdefault(trajectory_id // 4, set()).add(path[1].tobytes())
    assert len(starts) == 6 and all(len(noise) == 1 for noise in starts.values())
    assert all(len(second) == 4 for second in seen.values())
    for group in starts:
        own = [rows[4 * group + place] for place in range(4)]
        assert len({row["prompt"] for row in own}) == 1
        assert abs(sum(row["advantage"] for row in own)) < 1e-4 < max(row["advantage"] for row in own)


def test_a_second_set_has_prompts_reward_and_sampling_of_its_own_and_changes_no_training(
    model: Path, undisturbed: Path, tmp_path: Path
) -> None:
    words = user_reward(tmp_path, "return images.mean(axis=(1, 2, 3)).astype(np.float32)")[:1]
    words += [
        "rewards.mine.weight=null",
        "evaluation.rewards=[compressibility]",
        "evaluation.sets.held_out.prompts.list=[an owl,a bee in the snow]",
    ]
    own = {"count": 6, "every": 2, "rewards": "[mine]", "sampling.steps": 2, "sampling.guidance": 1}
    words += [f"evaluation.sets.held_out.{key}={value}" for key, value in own.items()]
    done = run_local(*small(model, "run", "run.batches=4", *words), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert_same_run(undisturbed, tmp_path / "runs" / "run")
    run = RunFolder(tmp_path / "runs" / "run")
    held_out = run.sets["held_out"]
    assert list(run.sets) == list(run.grids) == ["train", "held_out"]
    assert list(run.evaluations) == [0, 4] and list(held_out) == list(run.grids["held_out"]) == [0, 2, 4]
    rows = held_out[0]
    assert len(rows) == 6 and set(rows["prompt"].to_pylist()) == {"an owl", "a bee in the snow"}
    assert rows["mine"].null_count == 0 and rows["reward"].null_count == 6  # not what is trained on
    scored = {row["version"]: row for row in run.metrics if "evaluation/held_out/mine/mean" in row}
    assert scored.keys() == held_out.keys()
    for version, table in held_out.items():
        mean = scored[version]["evaluation/held_out/mine/mean"]
        assert mean == pytest.approx(float(table["mine"].to_numpy().mean()))
    assert "Evaluation set held_out" in (run.path / "report.html").read_text()

    policy = Policy.load(run.config.model, run.config.sampling, run.config.run.seed, "cpu", trainable=False)
    other = policies_of(policy, run.config)["held_out"]
    assert (other.num_steps, policy.num_steps) == (2, 3)
    made = rollout(other, rows["prompt"].to_pylist()[:2], rows["seed"].to_pylist()[:2])
    np.testing.assert_array_equal(made.images.mean(axis=(1, 2, 3)).astype(np.float32), rows["mine"].to_numpy()[:2])


def test_the_last_version_is_drawn_at_smaller_scales_of_its_lora(
    model: Path, undisturbed: Path, tmp_path: Path
) -> None:
    done = run_local(*small(model, "run", "run.batches=4", "evaluation.scales=[0.25,0.5]"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert_same_run(undisturbed, tmp_path / "runs" / "run")
    run = RunFolder(tmp_path / "runs" / "run")
    assert [list(run.sets[name]) for name in ("scale_25", "scale_50")] == [[4], [4]]
    found = by_scale(run)
    assert list(found) == [0.0, 0.25, 0.5, 1.0] and {len(rows) for rows in found.values()} == {2}
    assert len({tuple(rows["seed"].to_pylist()) for rows in found.values()}) == 1
    rewards = [rows["reward"].to_pylist() for rows in found.values()]
    assert all(one != other for one, other in pairwise(rewards))
    page = (run.path / "report.html").read_text()
    assert "By the LoRA's scale" in page and "the LoRA at 25 %" in page and "Evaluation set scale" not in page


BRIGHT = "return images.mean(axis=(1, 2, 3)).astype(np.float32)"
DARK = """
class Dark:
    def __call__(self, images, prompts):
        return -images.mean(axis=(1, 2, 3)).astype(np.float32)
"""


def hacked(model: Path, folder: Path, *more: str) -> list[str]:
    """Trained on brightness, and measured beside it is darkness: what is gained of one is lost of the other."""
    words = user_reward(folder, BRIGHT)
    with (folder / "my_rewards.py").open("a") as file:
        file.write(DARK)
    words += ["rewards.dark.path=my_rewards:Dark", "rewards.dark.weight=null", "guard.max_fall={train/dark: 0.05}"]
    return small(model, "run", *words, "run.batches=8", "evaluation.every=1", "evaluation.count=8", *more)


def test_the_guard_stops_a_run_whose_reward_is_hacked(model: Path, tmp_path: Path) -> None:
    stop = "guard.action=stop"
    for _ in range(2):  # the second finds what the first left, and trains nothing more
        done = run_local(*hacked(model, tmp_path, "learner.lr=5e-3", stop), cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        run = RunFolder(tmp_path / "runs" / "run")
        verdict = judge(history(run.metrics), run.config.guard, "train/reward")
        (version,) = verdict.wrong
        assert 0 < version < 8 and len(run.batches) == version and "finished" not in run.record
        assert verdict.best < version and verdict.sentences[0] in html.unescape((run.path / "report.html").read_text())
        best = json.loads((run.path / "lora_best" / "version.json").read_text())
        assert best == {"version": verdict.best, "by": "train/reward"}
        weights = [(folder / WEIGHT_NAME).read_bytes() for folder in (run.loras[verdict.best], run.path / "lora_best")]
        assert weights[0] == weights[1] and run.loras.keys() == set(range(version + 1))
    done = run_local(*hacked(model, tmp_path, "learner.lr=5e-3", "guard.action=note"), cwd=tmp_path)
    assert done.returncode == 0 and RunFolder(run.path).record["finished"] == 8, done.stderr


def test_a_best_lora_that_a_death_left_half_written_is_written_again(model: Path, tmp_path: Path) -> None:
    words = hacked(model, tmp_path, "learner.lr=5e-3")
    assert run_local(*words, "run.batches=2", cwd=tmp_path).returncode == 0
    best = tmp_path / "runs" / "run" / "lora_best"
    (best / "version.json").unlink()
    (best / WEIGHT_NAME).write_bytes(b"half of a fi")
    assert run_local(*words, "run.batches=3", cwd=tmp_path).returncode == 0
    run = RunFolder(tmp_path / "runs" / "run")
    assert run.best is not None
    assert (best / WEIGHT_NAME).read_bytes() == (run.loras[run.best] / WEIGHT_NAME).read_bytes()


def test_the_guard_slows_a_run_and_that_is_not_forgotten(model: Path, tmp_path: Path) -> None:
    def rates(*more: str) -> list[float]:
        done = run_local(*hacked(model, tmp_path, "learner.lr=5e-3", "guard.action=slow", *more), cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return [row["lr"] for row in RunFolder(tmp_path / "runs" / "run").batches]

    before = rates("run.batches=6")
    assert before[0] == 5e-3 and before == sorted(before, reverse=True) and before[-1] < 5e-3
    assert all(rate in [5e-3 * 0.5**n for n in range(7)] for rate in before)
    after = rates("run.batches=8", "guard.max_fall={}")  # nothing is wrong any more, and the rate stays
    assert after == before + [before[-1]] * 2


def test_the_guard_lets_a_good_run_be(model: Path, tmp_path: Path) -> None:
    words = hacked(model, tmp_path, "guard.max_fall={train/mine: 0.5}", "guard.max_kl=1e6", "guard.action=stop")
    done = run_local(*words, "learner.lr=5e-3", cwd=tmp_path)
    assert done.returncode == 0 and RunFolder(tmp_path / "runs" / "run").record["finished"] == 8, done.stderr
