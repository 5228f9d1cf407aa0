"""Shipped experiments find the shipped files from any folder; what the user writes is relative to where he stands."""

from pathlib import Path

import pytest

from actors.travel import as_sent
from buffer.run_folder import RunFolder
from common.errors import UserError
from conf.load import experiments, from_file, load
from conf.places import ROOT, SHIPPED
from conf.resume import check_same, save_config
from conf.schema import Config
from policy.source import check_model
from tests.running import SMALL
from tests.running_local import launch_here, run_local

SHIPPED_MODEL = f"{SHIPPED}pipeline"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "elsewhere"


def named(config: Config) -> list[str]:
    """Everything of Emoji World that the model and the rewards name."""
    args = [value for reward in config.rewards.values() for value in reward.args.values()]
    return [value for value in [config.model.path, *args] if isinstance(value, str) and SHIPPED in value]


@pytest.mark.parametrize("experiment", [name for name in experiments() if not name.startswith("sd15_")])
def test_a_shipped_experiment_finds_its_files(experiment: str, tmp_path: Path) -> None:
    for words in (experiment, str(ROOT / "conf" / "experiment" / f"{experiment}.yaml")):
        config = load([words])
        check_model(config.model)
        assert named(config) and all(Path(place).is_absolute() and Path(place).exists() for place in named(config))
        save_config(tmp_path / experiment, config, ["a cat"])
        assert str(ROOT) not in (tmp_path / experiment / "config.yaml").read_text()  # the checkout may move
        assert from_file(tmp_path / experiment / "config.yaml") == config
        assert load([str(tmp_path / experiment / "config.yaml")]) == config


def test_the_default_of_a_setting_is_shipped_too(elsewhere: Path) -> None:
    (elsewhere / "mine.yaml").write_text("rewards: {compressibility: {path: compressibility}}\n")
    assert load(["mine.yaml"]).model.path == str(ROOT / SHIPPED_MODEL)


@pytest.mark.parametrize("in_a_file", [False, True])
def test_what_the_user_writes_lies_where_he_stands(
    in_a_file: bool, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (elsewhere / "mine.yaml").write_text(f"model: {{path: {SHIPPED_MODEL}}}\n")
    words = ["mine.yaml"] if in_a_file else ["compressibility", f"model.path={SHIPPED_MODEL}"]
    config = load(words)
    with pytest.raises(UserError, match=f"model.path={elsewhere}/{SHIPPED_MODEL} is not a folder"):
        check_model(config.model)
    assert load(["compressibility", "model.path=models/x", "run.dir=r"]).model.path == "models/x"
    monkeypatch.chdir(ROOT)
    check_model(load([str(elsewhere / "mine.yaml") if in_a_file else words[0], *words[1:]]).model)


def test_the_same_model_is_the_same_run_from_anywhere(tmp_path: Path) -> None:
    run_dir, prompts = tmp_path / "run", ["a cat"]
    config = load(["aesthetic"])
    save_config(run_dir, config, prompts)
    text = (run_dir / "config.yaml").read_text()
    check_same(run_dir, load(["aesthetic", f"model.path={ROOT / SHIPPED_MODEL}"]), prompts)
    # As an absolute path was saved, and in a checkout that lay in another place.
    (run_dir / "config.yaml").write_text(text.replace(SHIPPED_MODEL, f"/another/checkout/{SHIPPED_MODEL}"))
    check_same(run_dir, config, prompts)
    for other in (f"{SHIPPED}other", "another/pipeline", f"/x/{SHIPPED}other"):
        (run_dir / "config.yaml").write_text(text.replace(SHIPPED_MODEL, other))
        with pytest.raises(UserError, match=rf"model\.path: \S+ -> {SHIPPED_MODEL}\)"):
            check_same(run_dir, config, prompts)


def test_other_hosts_look_in_their_copy_of_the_checkout() -> None:
    here, there = load(["aesthetic"]), load(["aesthetic", "ray.address=auto"])
    assert as_sent(here) == here
    assert as_sent(there).model.path == SHIPPED_MODEL and named(as_sent(there))[1] == f"{SHIPPED}clip"


def test_a_run_begun_in_the_checkout_goes_on_from_elsewhere(tmp_path: Path, elsewhere: Path) -> None:
    for folder, batches in ((ROOT, 1), (elsewhere, 2)):
        words = [
            *SMALL,
            "sampling.steps=2",
            "sampling.guidance=1",
            f"run.dir={tmp_path}",
            "run.name=mine",
            f"run.batches={batches}",
        ]
        done = run_local("compressibility", *words, cwd=folder)
        assert done.returncode == 0 and RunFolder(tmp_path / "mine").record["finished"] == batches, done.stderr


def test_launch_finds_the_shipped_model(elsewhere: Path) -> None:
    done = launch_here("compressibility", "ray.address=127.0.0.1:1", cwd=elsewhere)
    assert done.returncode == 2 and "no Ray cluster answers" in done.stderr, done.stderr
