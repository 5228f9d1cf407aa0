"""Real runs in which something fails that is not the work's fault: each ends as it should, and nothing else is lost."""

from pathlib import Path

import pyarrow.parquet as pq
from safetensors.torch import load_file, save_file

from buffer.orders import Evaluation, FixedSet, Plan
from buffer.run_folder import RunFolder
from conf.evaluations import FIRST
from tests.run_files import assert_same_run, trajectories
from tests.running import launch, small, user_reward
from tests.running_local import kill_local, run_local

BATCHES = 2


def command(model: Path, *settings: str) -> list[str]:
    return small(model, "run", f"run.batches={BATCHES}", f"evaluation.every={BATCHES}", *settings)


def as_undisturbed(model: Path, *settings: str) -> list[str]:
    return small(model, "run", "run.batches=4", *settings)


def the_sentence(errors: str) -> str:
    """What a run ended with: one line, and no traceback."""
    (line,) = errors.strip().splitlines()
    assert line.startswith(("launch.py: ", "workers.local: ")) and len(line) <= 520, line
    return line


def test_a_sampler_on_a_sick_device_costs_no_picture_while_another_works(
    model: Path, undisturbed: Path, tmp_path: Path
) -> None:
    done = launch(*as_undisturbed(model, "samplers.count=2"), cwd=tmp_path, sick="policy.rollout:rollout:sampler-0")
    assert done.returncode == 0, done.stderr
    assert "sampler-0.0 died (AcceleratorError: CUDA error" in done.stdout
    assert_same_run(undisturbed, tmp_path / "runs" / "run")


COLUMN_BY_ACTOR = """
        from rewards.base import Scores
        import ray, pathlib
        broken = not pathlib.Path("mended").exists()
        second = broken and ray.get_runtime_context().get_actor_name().startswith("reward-mine-1")
        kind = "text" if second else 1
        return Scores(np.zeros(len(images), np.float32), {"kind": [kind] * len(images)})
"""


def test_a_reward_that_answers_in_other_types_ends_the_run_which_goes_on_when_it_is_mended(
    model: Path, tmp_path: Path
) -> None:
    """One actor of its pool puts numbers into a column, the other text; each by itself is as it should be."""
    words = command(model, "rewards.mine.count=2", *user_reward(tmp_path, COLUMN_BY_ACTOR.strip()))
    done = launch(*words, cwd=tmp_path, delays="buffer.transitions:add_scores:0.5")
    assert done.returncode == 2, done.stdout
    assert "Reward mine" in the_sentence(done.stderr) and "'kind'" in done.stderr
    (tmp_path / "mended").touch()
    done = run_local(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = trajectories(tmp_path / "runs" / "run")
    assert len(rows) == BATCHES * 8 and all(row["set_aside"] is None for row in rows)


def test_a_buffer_whose_disk_hangs_for_two_minutes_costs_only_the_time(
    model: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """Nobody is late by it, though all time-outs are shorter."""
    patience = ["rewards.compressibility.timeout_s=60", "buffer.claim_timeout_s=60", "learner.timeout_s=60"]
    done = launch(*as_undisturbed(model, *patience), cwd=tmp_path, delays="buffer.journal:os.fsync:120:60")
    assert done.returncode == 0, done.stderr
    assert "the buffer does not answer" in done.stdout and "the buffer answers again" in done.stdout
    assert "died" not in done.stdout
    assert_same_run(undisturbed, tmp_path / "runs" / "run")


FAILING_PROMPTS = """
        if any(prompt.startswith("broken") for prompt in prompts): raise ValueError("too dark")
        return images.mean(axis=(1, 2, 3)).astype(np.float32)
"""


def with_broken_evaluation(folder: Path, evaluated: int, broken: int) -> list[str]:
    """Settings by which of `evaluated` evaluation pictures the first `broken` always fail, and none of any batch."""
    for seed in range(1000):
        prompts = tuple(f"prompt {number}" for number in range(40))
        plan = Plan(seed, prompts, 8, 2, (FixedSet(FIRST, evaluated, prompts),))
        chosen = [prompt for order in plan.evaluation(Evaluation(0, FIRST)) for prompt in order.prompts][:broken]
        trained = {prompt for batch in range(BATCHES) for order in plan.batch(batch) for prompt in order.prompts}
        if not trained & set(chosen) and not {"prompt 0", "prompt 39"} & set(chosen):  # on these a reward is tried
            mixed = [f"broken {prompt}" if prompt in chosen else prompt for prompt in plan.prompts]
            return [
                f"run.seed={seed}",
                f"prompts.list=[{','.join(mixed)}]",
                f"evaluation.count={evaluated}",
                "buffer.max_failed_share=0",
                *user_reward(folder, FAILING_PROMPTS.strip()),
            ]
    raise AssertionError("no seed will do")


def test_an_evaluation_with_a_broken_picture_stops_nothing(model: Path, tmp_path: Path) -> None:
    """It always fails, and max_failed_share allows none."""
    done = run_local(*command(model, *with_broken_evaluation(tmp_path, 40, 1)), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    run_dir = tmp_path / "runs" / "run"
    files = list((run_dir / "evaluation").glob("*.parquet"))
    assert len(files) == 2
    for file in files:
        rows = pq.read_table(file).to_pylist()
        assert len(rows) == 40
        assert [row["prompt"].split()[0] for row in rows if row["set_aside"]] == ["broken"]
    assert all(row["set_aside"] is None for row in trajectories(run_dir))


def test_an_evaluation_whose_weights_are_lost_is_missed_and_the_run_goes_on(model: Path, tmp_path: Path) -> None:
    """That of version 0 comes to nothing at first, so it is still open; then its recovery point's weights change."""
    words, run_dir = command(model, *with_broken_evaluation(tmp_path, 4, 4)), tmp_path / "runs" / "run"
    kill_local(*words, cwd=tmp_path, at="learner.update:Updater._optimizer_step:3")
    (weights,) = run_dir.glob("checkpoints/v00000.*/pytorch_lora_weights.safetensors")
    tensors = load_file(weights)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, weights)
    done = run_local(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    missed = [record for record in RunFolder(run_dir).history if record["kind"] == "missed"]
    (first,) = [record["why"] for record in missed if record["evaluation"] == [0, "train"]]
    assert "holds other weights" in first
    assert len(trajectories(run_dir)) == BATCHES * 8


def test_weights_that_are_not_those_of_their_version_are_handed_to_nobody(model: Path, tmp_path: Path) -> None:
    words, run_dir = command(model), tmp_path / "runs" / "run"
    kill_local(*words, cwd=tmp_path, at="learner.update:Updater._optimizer_step:3")
    weights = max(run_dir.glob("checkpoints/v00001.*/pytorch_lora_weights.safetensors"))
    tensors = load_file(weights)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, weights)
    done = run_local(*words, cwd=tmp_path)
    assert done.returncode == 2, done.stdout
    assert weights.parent.name in the_sentence(done.stderr)


def test_a_worker_that_cannot_start_ends_the_run_with_rays_reason(model: Path, tmp_path: Path) -> None:
    done = launch(*command(model), cwd=tmp_path, stillborn="default_worker.py")
    assert done.returncode == 2, done.stdout
    assert "libcudart.so.99" in the_sentence(done.stderr)
    assert not (tmp_path / "runs" / "run").exists()


def test_a_reward_from_the_users_own_file_trains_whatever_lies_beside_it(model: Path, tmp_path: Path) -> None:
    """The folder where he stands comes last: files with the names of Python's modules, of libraries and of ours take
    nobody's place."""
    for name in ("types", "random", "queue", "uuid", "numpy", "torch", "PIL", "rewards", "conf", "buffer", "policy"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('this is not the module you look for')")
    mine = user_reward(tmp_path, "return images.mean(axis=(1, 2, 3)).astype(np.float32)")
    done = launch(*command(model, *mine), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(row["reward"] == row["mine"] > 0 for row in trajectories(tmp_path / "runs" / "run"))


def test_a_module_that_takes_the_actors_place_is_told(model: Path, tmp_path: Path) -> None:
    (tmp_path / "actors.py").touch()
    done = launch(*command(model), cwd=tmp_path)
    assert done.returncode == 2 and "actors" in the_sentence(done.stderr), done.stderr
    assert not (tmp_path / "runs" / "run").exists()
