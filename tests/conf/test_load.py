"""How a configuration is composed, documented and checked when nothing is wrong with it."""

import dataclasses
import re
from enum import Enum
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from conf.declaration import ANY
from conf.load import CONF, experiments, from_file, help_text, load
from conf.prompts import resolve_prompts
from conf.schema import Config, DType, PromptsConfig
from conf.settings import settings
from conf.validate import cluster_fits, effective_gpus, validate
from prompts.sets import named_sets
from tests.running import EXPERIMENT


@pytest.mark.parametrize("name", experiments())
def test_every_shipped_experiment_is_valid_and_says_what_it_is(name: str) -> None:
    config = load([name])
    validate(config)
    assert config.experiment == config.run.name == name
    assert len(experiments()[name]) > 20
    assert resolve_prompts(config.prompts)


@pytest.mark.parametrize("name", ["compressibility", "incompressibility"])
def test_the_embedded_experiments_fit_on_two_cores_without_a_gpu(name: str) -> None:
    config, said = effective_gpus(load([name]), {"CPU": 2.0})
    cluster_fits(config, {"CPU": 2.0})
    assert said and "samplers.num_gpus=1" in said[0] and "learner.num_gpus=1" in said[0]


def test_gpus_stay_where_there_are_some() -> None:
    config = load(["compressibility"])
    assert effective_gpus(config, {"CPU": 2.0, "GPU": 1.0}) == (config, [])


def test_layers_lie_over_each_other(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("learner: {lr: 1e-3, clip_range: 2e-4}\nrewards: {a: {path: compressibility}}\n")
    config = load([str(path), "learner.lr=1e-5", "rewards.a.weight=2", "rewards.b.path=x:Y", "rewards.b.args.n=3"])
    assert config.learner.lr == 1e-5  # the command line
    assert config.learner.clip_range == 2e-4  # the file
    assert config.learner.weight_decay == Config().learner.weight_decay  # the schema
    assert config.experiment == config.run.name == "mine"
    assert config.rewards["a"].weight == 2.0 and config.rewards["b"].args == {"n": 3}


def test_without_an_experiment_the_default_one_is_taken() -> None:
    assert load(["samplers.count=3"]) == load(["compressibility", "samplers.count=3"])


def test_the_last_of_the_same_setting_counts() -> None:
    assert load(["compressibility", "run.seed=1", "run.seed=2"]).run.seed == 2


def test_a_later_layer_replaces_where_prompts_come_from() -> None:
    config = load(["compressibility", "prompts.list=[a cat, two dogs]"])
    assert config.prompts == PromptsConfig(set=None, list=["a cat", "two dogs"], file=None)
    assert resolve_prompts(config.prompts) == ["a cat", "two dogs"]


def test_the_configuration_is_plain_and_typed() -> None:
    config = load([EXPERIMENT, "learner.objective_args.k=1", "model.dtype=float16", "rewards.a.path=m:C"])
    config.rewards["a"].args = {"nested": {"list": [1, 2]}}
    assert config.learner.objective_args == {"k": 1} and config.model.dtype is DType.float16
    assert isinstance(config.learner.betas, tuple)

    def plain(value: object) -> bool:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return all(plain(getattr(value, field.name)) for field in dataclasses.fields(value))
        if isinstance(value, dict):
            return type(value) is dict and all(plain(v) for v in value.values())
        if isinstance(value, list | tuple):
            return type(value) in (list, tuple) and all(plain(v) for v in value)
        return value is None or type(value) in (int, float, str, bool) or isinstance(value, Enum)

    assert plain(config)


def test_a_saved_configuration_reads_back_the_same(tmp_path: Path) -> None:
    config = load(["compressibility", "learner.lr=1.2345e-7", "rewards.a.path=m:C", "rewards.a.args.x=[1,b]"])
    path = tmp_path / "config.yaml"
    path.write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
    assert from_file(path) == config
    assert load([str(path)]) == config


def test_every_setting_has_a_meaning_and_stands_in_the_help() -> None:
    text = help_text()
    for setting in settings():
        assert setting.meaning, f"{setting.key} has no meaning in schema.py"
        assert f"  {setting.key} ({setting.type}) = {setting.default}\n      {setting.meaning}" in text
    for name in (*experiments(), *named_sets()):
        assert name in text


def test_every_number_has_a_range() -> None:
    numbers = {s.key for s in settings() if s.type.split(" | ")[0] in ("int", "float")}
    assert numbers == {s.key for s in settings() if s.range is not ANY}


def test_every_setting_of_the_documentation_exists() -> None:
    text = (CONF.parent / "docs" / "configuration.md").read_text()
    known = {setting.key for setting in settings()}
    mentioned = set(re.findall(r"`((?:run|model|sampling|buffer|samplers|learner|evaluation|ray)\.[a-z_.]+)", text))
    assert mentioned and mentioned <= known, mentioned - known


# ---- prompts


@pytest.mark.parametrize("name", named_sets())
def test_a_named_set_resolves_to_different_prompts(name: str) -> None:
    prompts = resolve_prompts(PromptsConfig(set=name))
    assert len(prompts) == len(set(prompts)) > 0
    assert all(prompt == prompt.strip() and prompt.isprintable() for prompt in prompts)


def test_the_papers_sets_have_the_papers_sizes() -> None:
    sizes = {name: len(resolve_prompts(PromptsConfig(set=name))) for name in named_sets()}
    assert sizes["common_animals"] == 45
    assert sizes["animal_activities"] == 45 * 3
    assert sizes["counting"] == 45 * 7
    assert sizes["imagenet_animals"] == 398


def test_imagenet_animals_are_its_first_398_classes() -> None:
    from torchvision.models._meta import _IMAGENET_CATEGORIES

    assert resolve_prompts(PromptsConfig(set="imagenet_animals")) == _IMAGENET_CATEGORIES[:398]


def test_a_prompt_file_may_have_blank_lines_a_mark_and_windows_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa cat\r\n\r\n  zwei Füchse  \r\n".encode())
    assert resolve_prompts(PromptsConfig(file=str(path))) == ["a cat", "zwei Füchse"]


def test_arguments_belong_to_the_objective_that_they_were_given_for() -> None:
    """Another policy gradient takes them, too; a loss on clean pictures would refuse them."""
    words = ["compressibility", "learner.objective_args={step_weight: output}"]
    assert load(words).learner.objective_args == {"step_weight": "output"}
    assert load(["compressibility", "learner.objective=ddpo_sf"]).learner.objective_args == {"step_weight": "std"}
    assert load(["compressibility", "learner.objective=nft"]).learner.objective_args == {}
    assert load(["compressibility"]).learner.advantage_args == {"std": "batch"}
    assert load(["compressibility", "learner.advantage=by_batch"]).learner.advantage_args == {}
    own = ["compressibility", "learner.objective=nft", "learner.objective_args={levels: 2}"]
    assert load(own).learner.objective_args == {"levels": 2}
    pulled = ["compressibility", "learner.kl_weight=0.5", "learner.kl_target=0.1"]
    assert (load(pulled).learner.kl_weight, load(pulled).learner.kl_target) == (0.5, 0.1)
    sf = load(["compressibility", "learner.objective=ddpo_sf"]).learner
    assert sf.kl_weight == load(["compressibility"]).learner.kl_weight > 0
    other = load(["compressibility", "learner.objective=mine:Mine"]).learner
    assert (other.kl_weight, other.kl_target, other.train_share) == (0.0, None, 1.0)
    assert sf.train_share == load(["compressibility"]).learner.train_share < 1


def test_an_empty_mapping_takes_away_what_is_below() -> None:
    assert load(["compressibility"]).guard.max_fall and load(["compressibility"]).learner.objective_args
    words = ["compressibility", "guard.max_fall={}", "learner.objective_args={}"]
    assert load(words).guard.max_fall == {} and load(words).learner.objective_args == {}
    config = load([*words, "guard.max_fall.train/judge=2", "learner.objective_args.k=1"])
    assert config.guard.max_fall == {"train/judge": 2} and config.learner.objective_args == {"k": 1}


def test_a_name_below_a_mapping_of_numbers_may_have_dots() -> None:
    config = load([EXPERIMENT, "guard.max_fall.train/judge.setting=2", "guard.max_fall.train/reward=1"])
    assert config.guard.max_fall == {"train/judge.setting": 2.0, "train/reward": 1.0}
