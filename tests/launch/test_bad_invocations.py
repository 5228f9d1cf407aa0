"""A user's mistakes, through `launch.py` itself: one sentence on stderr, exit code 2, and existing runs untouched."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from conf.resume import RunLock
from tests.conf.test_invocations import BAD
from tests.pipelines import edit_json, tiny_pipeline
from tests.running import SMALL, launch
from tests.running_local import launch_here, run_local


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with a model, and a run `done` of two batches."""
    folder = tmp_path_factory.mktemp("place")
    tiny_pipeline(folder / "tiny")
    done = run_local(*command("run.name=done", "run.batches=2"), cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def inside(place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The place as working directory; nothing in its runs may be changed."""
    monkeypatch.chdir(place)
    before = contents(place / "runs")
    yield place
    assert contents(place / "runs") == before


def command(*more: str) -> list[str]:
    return ["compressibility", *SMALL, "model.path=tiny", *more]


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and not path.name.endswith(".lock")}


def assert_refused(arguments: list[str], says: str) -> None:
    assert_one_sentence(launch_here(*arguments, cwd=Path()), says)


@pytest.mark.parametrize(("words", "says"), BAD, ids=[" ".join(words)[:60] for words, _ in BAD])
def test_settings(words: list[str], says: str, inside: Path) -> None:
    assert_refused(words, says)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["model.path=nowhere/at/all"], "model.path=nowhere/at/all"),
        (["model.path=runs"], "has no model_index.json"),
        (["run.name=done", "run.batches=4", "learner.lr=0.5"], "learner.lr: 0.001 -> 0.5"),
        (["run.name=done", "run.batches=4", "run.seed=7"], "run.seed: 0 -> 7"),
        (["run.name=done", "run.batches=4", "prompts.list=[a cat]"], "prompt 2"),
        (["run.name=done", "run.batches=1"], "run.batches=1 is less than"),
        (["prompts.list=null", "prompts.file=empty.txt"], "empty.txt"),
        (["run.dir=tiny/model_index.json"], "run.dir"),
        (["run.mirror=nowhere"], "run.mirror=nowhere cannot be used"),
        (["run.mirror=ftp://host/folder"], "run.mirror=ftp://host/folder cannot be used"),
        (["run.mirror="], "run.mirror= cannot be used"),
        (["run.mirror=s3://"], "names no folder or bucket"),
        (["run.mirror=s3://bucket/runs?endpoint_override=127.0.0.1:1&scheme=http&region=x"], "cannot be used"),
        (["run.mirror=file:///proc/mirror"], "run.mirror=file:///proc/mirror cannot be used"),
        (["run.dir=/tmp", "run.mirror=/tmp"], "overlaps with the run folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_files_and_runs(more: list[str], says: str, inside: Path) -> None:
    (inside / "empty.txt").touch()
    assert_refused(command(*more), says)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"steps_offset": 0}, '"steps_offset": 1'),
        ({"set_alpha_to_one": True}, '"set_alpha_to_one": false'),
        ({"clip_sample": True}, "clip_sample"),
        ({"prediction_type": "sample"}, "prediction_type"),
    ],
)
def test_schedules_without_a_policy(changes: dict[str, object], says: str, inside: Path, tmp_path: Path) -> None:
    spoilt = tmp_path / "spoilt"
    shutil.copytree(inside / "tiny", spoilt)
    edit_json(spoilt / "scheduler" / "scheduler_config.json", **changes)
    assert_refused([*command(), f"model.path={spoilt}"], says)


def test_a_run_that_another_driver_holds(inside: Path) -> None:
    with RunLock(Path("runs/done")):
        assert_refused(command("run.name=done", "run.batches=4"), "in use by another driver")


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["ray.address=127.0.0.1:1"], "ray.address=127.0.0.1:1"),
        (["ray.address=ray://127.0.0.1:10001"], "on a host of the cluster"),
        (["model.lora.targets=[to_nothing]"], "to_nothing"),
        (["rewards.mine.path=nosuch:Reward"], "there is no module nosuch"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_seen_before_ray_starts(more: list[str], says: str, inside: Path, tmp_path: Path) -> None:
    assert_refused(command("run.name=new", f"run.dir={tmp_path}", *more), says)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["samplers.num_cpus=64"], "64"),
        (["rewards.compressibility.args={quality: 3}"], "rewards.compressibility.args"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_only_the_cluster_shows(more: list[str], says: str, inside: Path, tmp_path: Path) -> None:
    assert_one_sentence(launch(*command("run.name=new", f"run.dir={tmp_path}", *more), cwd=inside), says)


def test_a_corrected_command_runs_where_nothing_was_made_yet(inside: Path, tmp_path: Path) -> None:
    here = ["run.name=new", f"run.dir={tmp_path}", "run.batches=1"]
    assert_refused(command(*here, "run.seed=1", "model.lora.targets=[to_nothing]"), "to_nothing")
    for start in (run_local, launch_here):
        done = start(*command(*here), cwd=inside)
        assert done.returncode == 0, done.stderr
    assert_refused(command(*here, "run.seed=1"), "run.seed: 0 -> 1")


@pytest.mark.parametrize(
    ("file", "start"),
    [
        ("pytorch_lora_weights.safetensors", launch),
        ("optimizer.safetensors", run_local),
        ("state.json", run_local),
    ],
)
def test_a_corrupt_recovery_point(
    file: str, start: Callable[..., CompletedProcess[str]], inside: Path, tmp_path: Path
) -> None:
    shutil.copytree(inside / "runs" / "done", tmp_path / "done")
    victim = max((tmp_path / "done" / "checkpoints").glob("v00002*")) / file
    victim.write_bytes(victim.read_bytes()[:-20])
    assert_one_sentence(start(*command("run.name=done", f"run.dir={tmp_path}", "run.batches=4"), cwd=inside), file)


def assert_one_sentence(refused: CompletedProcess[str], says: str) -> None:
    assert refused.returncode == 2, refused.stderr
    assert says in refused.stderr, refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1, refused.stderr
    assert "Traceback" not in refused.stdout + refused.stderr
