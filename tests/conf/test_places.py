"""Settings that name a place: `~` is written out and saved so; what no disk can have is refused first."""

import os
from pathlib import Path

import pytest

from common.errors import UserError
from conf.load import load
from conf.resume import RunLock, save_config
from conf.validate import validate


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


def test_a_tilde_is_home_in_every_place_and_saved_as_what_it_is(home: Path, tmp_path: Path) -> None:
    (home / "prompts.txt").write_text("a cat\n")
    words = ["run.dir=~/runs", "run.mirror=~/mirror", "model.path=~/m", "model.lora.init_from=~/l", "ray.temp_dir=~"]
    config = load(["compressibility", *words, "prompts.file=~/prompts.txt"])
    places = [config.run.dir, config.run.mirror, config.model.path, config.model.lora.init_from, config.ray.temp_dir]
    assert places == [*(f"{home}/{name}" for name in ("runs", "mirror", "m", "l")), str(home)]
    assert config.prompts.file == f"{home}/prompts.txt"
    save_config(tmp_path / "run", config, ["a cat"])
    assert "~" not in (tmp_path / "run" / "config.yaml").read_text()
    again = load([str(tmp_path / "run" / "config.yaml")])
    again.prompts.file = config.prompts.file  # a run goes on with its own copy
    assert again == config


def test_an_experiment_may_lie_at_home(home: Path) -> None:
    (home / "mine.yaml").write_text("run: {dir: ~/there}\nrewards: {a: {path: m:C}}\n")
    assert load(["~/mine.yaml"]).run.dir == f"{home}/there"


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("run.dir=~nobody_at_all/x", "no such user"),
        ("run.dir=$HOME/x", "only a shell replaces"),
        ("model.path=a/$HOME", "only a shell replaces"),
        ("run.mirror=file:///~/x", "means nothing in a URI"),
        ("run.dir=" + "x" * 256, "longer than a path can be"),
        ("run.dir=" + "é" * 128, "longer than a path can be"),
        ("model.path=" + "x/" * 2048, "longer than a path can be"),
        ("prompts.file=" + "x" * 300, "longer than a path can be"),
        ("run.dir=", "it is empty"),
        ("ray.temp_dir=/" + "x" * 60, "too long for the sockets"),
        ("ray.temp_dir=/tmp/ü", "not in ASCII"),
    ],
    ids=lambda value: value[:30],
)
def test_what_cannot_be_a_place_is_refused(word: str, says: str, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=says) as caught:
        validate(load(["compressibility", word]))
    assert word.partition("=")[0] in str(caught.value) and len(str(caught.value)) <= 500
    assert sorted(tmp_path.iterdir()) == before


def test_a_long_folder_for_temporary_files_is_refused_where_ray_would_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", "/" + "x" * 60)
    with pytest.raises(UserError, match=r"TMPDIR=/xxx.* too long for the sockets .* ray\.temp_dir=/tmp/ray"):
        validate(load(["compressibility"]))
    validate(load(["compressibility", "ray.temp_dir=/tmp/ray"]))
    validate(load(["compressibility", "ray.address=auto"]))


@pytest.mark.parametrize("name", ["with a space", "日本語", "a=b", "..", "a/../b", "x'y"])
def test_an_odd_place_is_used_as_it_is(name: str, tmp_path: Path) -> None:
    config = load(["compressibility", f"run.dir={name}"])
    validate(config)
    assert config.run.dir == name
    with RunLock(Path(config.run.dir) / config.run.name):
        save_config(Path(config.run.dir) / config.run.name, config, ["a cat"])
    assert load([f"{name}/compressibility/config.yaml"]) == config
    assert os.path.realpath(name) in str((Path(name) / "compressibility").resolve())
