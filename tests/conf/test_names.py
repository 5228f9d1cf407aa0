"""The names that a reward cannot have are those of columns and metrics that every run writes."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from actors.gauges import OF_ALL_REWARDS
from common.errors import UserError
from conf.load import load
from conf.names import COLUMNS, METRICS
from conf.validate import validate
from learner.batch import Batch
from learner.metrics import reward_metrics
from tests.buffer_toy import buffer, finish

REWARD = "size"  # of the toy run


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """What a run with evaluations leaves for people and their queries."""
    run_dir = tmp_path_factory.mktemp("run")
    finish(buffer(run_dir, evaluate_versions=(0,)))
    found = [*run_dir.glob("trajectories/*.parquet"), *run_dir.glob("evaluation/*.parquet")]
    assert len({path.parent for path in found}) == 2
    return found


def test_the_taken_names_are_the_columns_that_a_run_writes(files: list[Path], tmp_path: Path) -> None:
    written = {name for path in files for name in pq.read_schema(path).names}
    assert (written - {REWARD}) | {"latents", "timesteps", "log_probs", "image"} | {"score"} == COLUMNS


def test_the_taken_names_are_the_metrics_of_all_rewards() -> None:
    rewards = np.arange(2, dtype=np.float32)
    batch = Batch(0, ("a", "b"), rewards, {}, rewards, rewards, rewards, rewards, rewards)
    keys = {key for key in reward_metrics(batch, 2, {"a": 1.0}) if key.startswith("reward/")}
    assert {f"reward/{name}" for name in METRICS} == keys == set(OF_ALL_REWARDS)


UNFIT = [
    "Mean",
    "STD",
    "Prompt",
    "AGE_in_flight",
    "std-per-prompt",
    "a.b",
    "a b",
    "ü",
    "-a",
    "_a",
    "x" * 101,
    ".",
    "${x}",
]


@pytest.mark.parametrize("name", [*sorted(COLUMNS | METRICS), *UNFIT])
def test_a_taken_or_unfit_name_is_refused_on_the_command_line_and_in_a_file(name: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        f"prompts: {{set: counting}}\nrewards: {{'{name}': {{path: compressibility}}}}\n"
    )
    for words in ([str(tmp_path / "mine.yaml")], ["compressibility", f"rewards.{name}.path=compressibility"]):
        with pytest.raises(UserError) as caught:
            validate(load(words))
        assert len(str(caught.value)) <= 500 and str(caught.value).isprintable()


@pytest.mark.parametrize("other", ["Dark", "DARK", "d-ark"])
def test_two_rewards_that_a_database_would_take_for_one_are_refused(other: str) -> None:
    first = "d_ark" if "-" in other else "dark"
    with pytest.raises(UserError, match=f"rewards.{first} and rewards.{other} differ only in"):
        validate(load(["compressibility", f"rewards.{first}.path=m:A", f"rewards.{other}.path=m:B"]))


def test_names_that_look_like_numbers_or_truth_are_names(tmp_path: Path) -> None:
    names = ["007", "yes", "null", "1e3", "mine", "Mine2"]
    rewards = "".join(f"  {name}: {{path: compressibility}}\n" for name in names)
    (tmp_path / "mine.yaml").write_text(f"prompts: {{set: counting}}\nrewards:\n{rewards}")
    config = load([str(tmp_path / "mine.yaml")])
    validate(config)
    assert list(config.rewards) == names
