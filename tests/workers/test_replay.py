"""Replay: a new LoRA from what other runs have sampled."""

import shutil
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from buffer.run_folder import RunFolder
from buffer.sources import sources, stored
from common.errors import UserError
from conf.load import load
from conf.resume import RunLock
from tests.run_files import assert_same_run
from tests.running import small
from tests.running_local import launch_here, run_local


@pytest.fixture(scope="module")
def sampled(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two runs, of which all tensors are kept: a policy gradient's, and a longer one's."""
    folder = tmp_path_factory.mktemp("sampled")
    for name, more in (("a", ["run.batches=2"]), ("b", ["run.batches=3", "run.seed=1"])):
        done = run_local(*small(model, name, "buffer.keep_batches=9", *more), cwd=folder)
        assert done.returncode == 0, done.stderr
    return folder / "runs"


def words(sampled: Path, *more: str) -> list[str]:
    return ["replay", f"from={sampled}/a,{sampled}/b", "learner.objective=nft", "run.dir=runs", "run.name=run", *more]


def pairs(run: RunFolder) -> list[tuple[object, object, object]]:
    """(prompt, seed, reward) of all trained trajectories, in the order of their ids."""
    rows = sorted(run.trajectories().to_pylist(), key=lambda row: row["trajectory_id"])
    return [(row["prompt"], row["seed"], row["compressibility"]) for row in rows]


def test_every_pass_has_every_trajectory_once_with_its_own_reward(sampled: Path, tmp_path: Path) -> None:
    done = launch_here(*words(sampled, "run.batches=10", "evaluation.every=5"), cwd=tmp_path)
    assert done.returncode == 0 and "finished: over" in done.stdout, done.stderr
    run = RunFolder(tmp_path / "runs" / "run")
    stored = Counter(pair for name in "ab" for pair in pairs(RunFolder(sampled / name)))
    trained = pairs(run)
    assert stored.total() == 40 and len(trained) == 80
    assert Counter(trained[:40]) == Counter(trained[40:]) == stored
    assert trained[:40] != trained[40:]
    assert list(run.evaluations) == [0, 5, 10] and run.record["finished"] == 10
    assert (run.path / "report.html").exists() and all(row["denoising/error"] > 0 for row in run.batches)


def test_a_replay_goes_on_with_the_same_bits(sampled: Path, tmp_path: Path) -> None:
    for name, until in (("whole", 4), ("parts", 2), ("parts", 4)):
        done = run_local(*words(sampled, f"run.name={name}", f"run.batches={until}"), cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    record = (tmp_path / "runs" / "parts" / "run.json").read_bytes()
    done = run_local(*words(sampled, "run.name=parts", "run.batches=4"), cwd=tmp_path)
    assert "is finished, all 4 batches are trained" in done.stdout and "run.batches=8" in done.stdout
    assert (tmp_path / "runs" / "parts" / "run.json").read_bytes() == record
    assert_same_run(tmp_path / "runs" / "whole", tmp_path / "runs" / "parts")


def test_a_replay_goes_on_with_the_runs_that_it_was_begun_with_alone(
    sampled: Path, model: Path, tmp_path: Path
) -> None:
    """Another run of one seed drew the same prompts and seeds, and made other pictures of them."""
    again = ["run.batches=2", "buffer.keep_batches=9", "learner.lr=3e-3"]
    assert run_local(*small(model, "c", *again), cwd=tmp_path).returncode == 0
    mine = words(sampled, "run.batches=1", "learner.lr=1e-3")
    for runs, says in (
        (f"{sampled}/a", None),
        (f"{tmp_path}/runs/c", "another plan"),
        (f"{sampled}/a,{tmp_path}/runs/c", "another plan"),
        (f"{sampled}/a", None),
    ):
        done = run_local(*mine[:1], f"from={runs}", *mine[2:], cwd=tmp_path)
        assert done.returncode == (2 if says else 0) and (says or "") in done.stderr, done.stderr


def test_a_run_that_goes_on_is_not_replayed(sampled: Path, tmp_path: Path) -> None:
    with RunLock(sampled / "a"):
        done = run_local(*words(sampled), cwd=tmp_path)
    assert done.returncode == 2 and "a, which still goes on: wait until it is over" in done.stderr, done.stderr


def test_policy_gradients_learn_from_paths_and_say_how_many_count(sampled: Path, tmp_path: Path) -> None:
    done = run_local(*words(sampled, "learner.objective=ddpo_decoupled", "run.batches=2"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for row in RunFolder(tmp_path / "runs" / "run").batches:
        assert 0.1 < row["ess/step"] <= 1 and row["ratio/max_abs_log"] > 0


def test_paths_that_are_too_far_away_are_refused(sampled: Path, model: Path, tmp_path: Path) -> None:
    far = ["learner.lr=0.3", "run.batches=3", "buffer.keep_batches=9"]
    assert run_local(*small(model, "far", *far), cwd=tmp_path).returncode == 0
    own = ["replay", "from=runs/far", "learner.objective=ddpo_decoupled", "run.name=run", "run.batches=3"]
    done = run_local(*own, cwd=tmp_path)
    assert done.returncode == 2 and "effective sample size" in done.stderr, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["learner.objective=ddpo_sf", "learner.optimizer_steps=1"], "learner.objective=ddpo_sf with run.replay"),
        (["buffer.batch_size=48"], "have kept the tensors of 40 trajectories, fewer than a batch (48)"),
        (["rewards.other.path=incompressibility"], "has no scores of other: it was trained on compressibility"),
        (["sampling.steps=2", "learner.objective=ddpo_is"], "was made with sampling"),
    ],
)
def test_what_cannot_be_replayed_is_a_sentence(more: list[str], says: str, sampled: Path, tmp_path: Path) -> None:
    done = run_local(*words(sampled, *more), cwd=tmp_path)
    assert done.returncode == 2 and says in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert not (tmp_path / "runs" / "run").exists()


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["from={0}/b"], "twice, and each trajectory counts once"),
        (["from={0}/link"], "twice, and each trajectory counts once"),
        (["prompts.list=[a zebra]"], "prompts of a replay are those of its runs"),
        (["run.replay=[~/x]"], "/x/prompts.txt"),
    ],
)
def test_what_was_never_meant_is_a_sentence_at_once(more: list[str], says: str, sampled: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(sampled / "a")
    own = [word.format(sampled if "link" not in word else tmp_path) for word in more]
    done = launch_here(*words(sampled, *own), cwd=tmp_path)
    assert done.returncode == 2 and says in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_a_run_does_not_learn_from_itself(sampled: Path) -> None:
    with pytest.raises(UserError, match=r"run\.name=a is one of the runs that are replayed"):
        sources(load(words(sampled, f"run.dir={sampled}", "run.name=a")))


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("prompts.txt", b"a c\xe2t\n", "a prompts.txt cannot be read"),
        ("prompts.txt", b"", "holds no prompt"),
        ("config.yaml", b"run: null\n", "run is null, and no group of settings"),
        ("config.yaml", b"buffer: hello\n", "buffer is hello, and no group of settings"),
    ],
)
def test_a_run_with_a_spoilt_file_is_a_sentence(
    file: str, content: bytes, says: str, sampled: Path, tmp_path: Path
) -> None:
    shutil.copytree(sampled / "a", tmp_path / "runs" / "a, b")
    (tmp_path / "runs" / "a, b" / file).write_bytes(content)
    done = launch_here("replay", "from=runs/a, b", "learner.objective=nft", cwd=tmp_path)
    assert done.returncode == 2 and says in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_a_column_that_changed_its_kind_between_starts_is_no_part_of_a_replay(sampled: Path, tmp_path: Path) -> None:
    """A reward that was mended may store something else, and its run goes on."""
    run = shutil.copytree(sampled / "b", tmp_path / "runs" / "b")
    for cell, path in zip((1.0, "one"), sorted((run / "trajectories").glob("*.parquet"))[:2], strict=True):
        rows = pq.read_table(path)
        pq.write_table(rows.append_column("compressibility.what", pa.array([cell] * len(rows))), path)
    config = load(["replay", f"from={run}", "learner.objective=nft"])
    assert len(stored(sources(config), config)) == 24


def test_the_name_of_a_replay_is_one_that_a_run_can_have(sampled: Path, tmp_path: Path) -> None:
    (tmp_path / "my runs").mkdir()
    shutil.copytree(sampled / "a", tmp_path / "my runs" / "a, b")
    config = load(["replay", f"from={tmp_path}/my runs/a, b/checkpoints/..", "learner.objective=nft"])
    assert config.run.name == "replay-of-a--b" and config.run.dir == f"{tmp_path}/my runs"


def test_runs_that_are_none_are_a_sentence(tmp_path: Path) -> None:
    for name in ("~no-such-user/a", "a" * 300):
        with pytest.raises(UserError, match="is no run"):
            load(["replay", f"from={name}"])
    with pytest.raises(UserError, match=r"a replay needs runs to learn from: python launch\.py replay from="):
        load(["replay", "learner.objective=rwr"])
    with pytest.raises(UserError, match=r"from=.*nothing is no run"):
        load(["replay", f"from={tmp_path}/nothing"])
