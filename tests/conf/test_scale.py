import threading
from pathlib import Path

import pytest

from common.errors import UserError
from conf import scale
from conf.load import load
from conf.resume import RunLock, save_config
from tests.running import EXPERIMENT, wait_for


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    save_config(tmp_path / "run", load([EXPERIMENT]), ["a cat"])
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "asks for nothing"),
        (["samplers.count=0"], "samplers.count=0 must be at least 1"),
        (["samplers.count=many"], "wrong type"),
        (["learner.lr=1"], "learner.lr cannot change while a run goes on"),
        (["learner.count=2"], "learner.count cannot change"),
        (["rewards.beauty.count=2"], "no such reward, only compressibility"),
        (["samplers"], "is not a setting"),
        (["samplers.count=2"], "no driver works on"),
    ],
)
def test_what_is_refused_leaves_no_request(run_dir: Path, words: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        scale.ask(run_dir, words)
    assert scale.requested(run_dir) is None


def test_the_folder_where_one_stands(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run_dir)
    with pytest.raises(UserError, match=f"no driver works on {run_dir}"):
        scale.ask(Path(), ["samplers.count=2"])
    with RunLock(run_dir):
        monkeypatch.setattr(scale, "PATIENCE_S", 0.0)
        with pytest.raises(UserError, match="has not answered"):
            scale.ask(Path(), ["samplers.count=2"])


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a run"):
        scale.ask(tmp_path, ["samplers.count=2"])


def test_who_asks_waits_until_the_driver_has_done_it(run_dir: Path) -> None:
    answers: list[str] = []
    with RunLock(run_dir):
        asking = threading.Thread(
            target=lambda: answers.append(scale.ask(run_dir, ["samplers.count=3", "rewards.compressibility.count=2"]))
        )
        asking.start()
        layer = wait_for("a request", lambda: scale.requested(run_dir))
        assert asking.is_alive()
        config = scale.scaled(load([EXPERIMENT]), layer)
        assert (config.samplers.count, config.rewards["compressibility"].count) == (3, 2)
        (run_dir / scale.REQUEST).unlink()
        asking.join()
    assert answers == ["samplers.count 1 -> 3, rewards.compressibility.count 1 -> 2"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"samplers: {count: 2",
        b"\xff\xfe\x00",
        b"- a\n",
        b"7\n",
        b"words\n",
        b"samplers: 3\n",
        b"samplers: {count: many}\n",
        b"samplers: {count: 0}\n",
        b"samplers: {count: [2]}\n",
        b"samplers: {count: !!python/name:os.system }\n",
        b"learner: {lr: 1.0}\n",
        b"rewards: {gone: {count: 2}}\n",
        b"rewards: {compressibility: {count: null}}\n",
        None,
    ],
    ids=repr,
)
def test_a_request_that_cannot_be_granted_is_a_sentence_and_set_aside(content: bytes | None, run_dir: Path) -> None:
    request = run_dir / scale.REQUEST
    for _ in range(2):
        request.mkdir() if content is None else request.write_bytes(content)
        with pytest.raises(UserError) as caught:
            layer = scale.requested(run_dir)
            assert layer is not None
            scale.scaled(load([EXPERIMENT]), layer)
        said = scale.set_aside(run_dir, caught.value)
        assert "\n" not in said and str(caught.value) in said
        assert scale.requested(run_dir) is None
    assert len(list(run_dir.glob(scale.REFUSED))) == 2


def test_who_asks_hears_that_the_driver_cannot(run_dir: Path) -> None:
    answers: list[str] = []

    def ask() -> None:
        try:
            answers.append(scale.ask(run_dir, ["samplers.count=3"]))
        except UserError as error:
            answers.append(str(error))

    with RunLock(run_dir):
        asking = threading.Thread(target=ask)
        asking.start()
        wait_for("a request", lambda: scale.requested(run_dir))
        scale.set_aside(run_dir, "it is not to be")
        asking.join(30)
    assert len(answers) == 1 and "cannot do so" in answers[0]
