"""What a run folder refuses to go on with, and that one driver at a time holds it."""

import copy
import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from buffer.journal import Journal
from common.errors import UserError
from conf.load import CONF, load
from conf.prompts import resolve_prompts
from conf.resume import RunLock, check_resume, save_config
from conf.schema import Config
from conf.settings import flatten, settings

BASE = [
    "compressibility",
    "run.batches=40",
    "samplers.threads=2",
    "learner.lr=1e-3",
    "rewards.dark.path=my:Dark",
    "rewards.dark.args.n=1",
    "prompts.list=[a cat,a dog]",
    "evaluation.sets.dark.prompts.list=[an owl]",
]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    config = load(BASE)
    save_config(tmp_path / "run", config, resolve_prompts(config.prompts))
    (tmp_path / "run" / "checkpoints" / "v00000.1").mkdir(parents=True)
    return tmp_path / "run"


def again(run_dir: Path, *words: str) -> None:
    config = load([*BASE, *words])
    check_resume(run_dir, config, resolve_prompts(config.prompts))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["run.batches=41"],
        ["samplers.count=7", "samplers.num_cpus=2", "learner.num_gpus=0"],
        ["rewards.dark.count=2", "rewards.dark.timeout_s=9", "rewards.dark.num_cpus=4"],
        ["buffer.keep_batches=9", "buffer.max_failed_share=0.5", "buffer.claim_timeout_s=5", "checkpoints.keep=1"],
        ["ray.dashboard=false", "ray.address=auto"],
        ["learner.microbatch=1", "learner.gradient_checkpointing=true"],  # what out of memory advises
    ],
    ids=" ".join,
)
def test_what_may_change(run_dir: Path, words: list[str]) -> None:
    before = contents(run_dir)
    again(run_dir, *words)
    assert contents(run_dir) == before


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["learner.lr=1e-4"], "learner.lr: 0.001 -> 0.0001"),
        (["learner.lr=1e-4", "run.seed=3"], "run.seed: 0 -> 3; learner.lr: 0.001 -> 0.0001"),
        (["samplers.threads=1"], "samplers.threads: 2 -> 1"),
        (["learner.betas=[0.8,0.9]"], "learner.betas: (0.9, 0.999) -> (0.8, 0.9)"),
        (["model.variant=fp16"], "model.variant: null -> fp16"),
        (["model.dtype=float16"], "model.dtype: float32 -> float16"),
        (["rewards.dark.args.n=2"], "rewards.dark.args.n: 1 -> 2"),
        (["rewards.dark.args.m=2"], "rewards.dark.args.m: absent -> 2"),
        (["rewards.dark.weight=2"], "rewards.dark.weight: 1.0 -> 2.0"),
        (["rewards.dark.batch_size=2"], "rewards.dark.batch_size: 16 -> 2"),
        (["rewards.dark.threads=2"], "rewards.dark.threads: 1 -> 2"),
        (["rewards.bright.path=my:Bright"], "rewards.bright: absent -> my:Bright"),
        (["evaluation.count=64"], "evaluation.count: 128 -> 64"),
        (["evaluation.sets.dark.prompts.list=[a bat]"], "evaluation.sets.dark.prompts.list: ['an owl'] -> ['a bat']"),
        (["evaluation.sets.bright.every=2"], "evaluation.sets.bright.prompts.set: absent -> null"),
        (["prompts.list=[a cat,a fox]"], "prompt 2: 'a dog' -> 'a fox'"),
        (["prompts.list=[a cat,a dog,a fox]"], "prompt 3: None -> 'a fox'"),
        (["run.batches=39"], "run.batches=39 is less than the 40"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_may_not_change_is_shown(run_dir: Path, words: list[str], says: str) -> None:
    before = contents(run_dir)
    with pytest.raises(UserError) as caught:
        again(run_dir, *words)
    assert says in str(caught.value) and "\n" not in str(caught.value)
    assert contents(run_dir) == before


@pytest.mark.long
def test_every_setting_is_compared_unless_it_is_listed(run_dir: Path) -> None:
    """Changes one leaf after the other: no setting is overlooked by the comparison."""
    base = load(BASE)
    before = flatten(dataclasses.asdict(base))
    for setting in settings():
        key = setting.key.replace("<name>", "dark")
        config = copy.deepcopy(base)
        *parents, last = key.split(".")
        holder: object = config
        for parent in parents:
            holder = holder[parent] if isinstance(holder, dict) else getattr(holder, parent)
        setattr(holder, last, {"other": 1} if last == "args" else "something else")
        if last == "batches":
            config.run.batches = 99
        assert flatten(dataclasses.asdict(config)) != before
        if setting.may_change:
            check_resume(run_dir, config, ["a cat", "a dog"])
        else:
            with pytest.raises(UserError):
                check_resume(run_dir, config, ["a cat", "a dog"])


def test_the_same_prompts_may_come_from_elsewhere(run_dir: Path) -> None:
    again(run_dir, "prompts.list=null", f"prompts.file={run_dir / 'prompts.txt'}")


def test_a_run_without_its_recovery_points_is_still_that_run(run_dir: Path) -> None:
    """Else its settings would be written over before anybody misses them."""
    (run_dir / "checkpoints" / "v00000.1").rmdir()
    again(run_dir, "learner.lr=5e-2")  # it ended before version 0
    journal = Journal(run_dir / "journal")
    journal.append(({"kind": "trained", "batch": -1},))
    with pytest.raises(UserError, match=r"learner\.lr"):
        again(run_dir, "learner.lr=5e-2")


def test_a_removed_reward_is_refused(run_dir: Path) -> None:
    config = load([word for word in BASE if not word.startswith("rewards.")])
    with pytest.raises(UserError, match=r"rewards\.dark: my:Dark -> absent"):
        check_resume(run_dir, config, ["a cat", "a dog"])


def test_the_saved_configuration_goes_on_with_the_run(tmp_path: Path) -> None:
    config = load([*BASE, f"run.dir={tmp_path}", "run.name=mine"])
    save_config(tmp_path / "mine", config, ["a cat", "a dog"])
    assert load([str(tmp_path / "mine" / "config.yaml")]) == config


def test_a_new_run_and_one_that_ended_while_it_was_saved_begin(tmp_path: Path) -> None:
    again(tmp_path / "new")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "prompts.txt").write_text("a cat\n")
    (tmp_path / "half" / ".config.yaml.partial").touch()
    again(tmp_path / "half")
    save_config(tmp_path / "early", load(BASE), ["a cat", "a dog"])
    again(tmp_path / "early", "learner.lr=1e-4")  # nothing was made with the old one


def test_a_folder_that_is_no_run_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="is not a run"):
        again(tmp_path)


@pytest.mark.parametrize("text", ["", "learner: {lr: 1e-4", "learner: {gone: 1}\n", "rewards: {a: {weight: 1}}\n"])
def test_a_damaged_saved_configuration_is_a_sentence(run_dir: Path, text: str) -> None:
    (run_dir / "config.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        again(run_dir)
    assert "\n" not in str(caught.value)


def test_lost_prompts_are_a_sentence(run_dir: Path) -> None:
    (run_dir / "prompts.txt").unlink()
    with pytest.raises(UserError, match=r"lost its prompts\.txt"):
        again(run_dir)


# ---- the lock

HOLDER = """
import sys
from pathlib import Path
from conf.resume import RunLock
with RunLock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def hold(run_dir: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", HOLDER, str(run_dir)]
    process = subprocess.Popen(command, cwd=CONF.parent, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_a_second_driver_is_refused_with_the_name_of_the_first(run_dir: Path) -> None:
    before = contents(run_dir)
    holder = hold(run_dir)
    with pytest.raises(UserError) as caught, RunLock(run_dir):
        pass
    assert f"process {holder.pid}" in str(caught.value) and "\n" not in str(caught.value)
    holder.communicate("")
    with RunLock(run_dir):
        pass
    assert contents(run_dir) == before


def test_a_killed_driver_leaves_no_lock(run_dir: Path) -> None:
    holder = hold(run_dir)
    os.kill(holder.pid, signal.SIGKILL)
    holder.communicate()
    with RunLock(run_dir):
        pass


def test_a_process_started_under_the_lock_does_not_keep_it(run_dir: Path) -> None:
    with RunLock(run_dir):
        child = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
    with RunLock(run_dir):
        pass
    child.communicate(b"")


def test_two_runs_do_not_share_a_lock(tmp_path: Path) -> None:
    with RunLock(tmp_path / "a"), RunLock(tmp_path / "b"):
        pass
    assert not (tmp_path / "a").exists()


def test_an_unwritable_place_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"run\.dir"), RunLock(tmp_path / "file" / "run"):
        pass


def test_the_schema_has_no_leaf_that_cannot_be_saved(tmp_path: Path) -> None:
    save_config(tmp_path, Config(), ["a cat"])
    assert not list(tmp_path.glob(".*"))
