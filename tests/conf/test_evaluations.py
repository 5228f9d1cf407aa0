"""Evaluation sets in the configuration: what they leave to the run, and what is refused."""

from pathlib import Path

import pytest

from buffer.settings import plan_of, rules_of
from common.errors import UserError
from conf.evaluations import sets_of
from conf.load import load
from conf.validate import validate
from tests.running import EXPERIMENT

ONE = "evaluation.sets.one"
SECOND = ["rewards.second.path=incompressibility", "rewards.second.weight=null"]


def test_what_a_set_does_not_say_is_the_runs() -> None:
    config = load([EXPERIMENT, f"{ONE}.every=7", *SECOND, "evaluation.sets.two.rewards=[second,compressibility]"])
    validate(config)
    train, one, _ = sets_of(config).values()
    assert list(sets_of(config)) == ["train", "one", "two"]
    assert (
        one.prompts is None
        and one.count == train.count
        and one.rewards == train.rewards == ("compressibility", "second")
    )
    assert one.sampling == config.sampling and one.versions(20) == (0, 7, 14, 20)
    rules = rules_of(config)
    assert rules.rewards == ("compressibility",) and rules.sets["two"].rewards == ("second", "compressibility")
    plan = plan_of(config, ["a cat", "a dog"])
    assert [fixed.prompts for fixed in plan.sets] == [("a cat", "a dog")] * 3


def test_a_set_may_have_prompts_and_sampling_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "owls.txt").write_text("an owl\nan owl at night\n")
    words = [f"{ONE}.prompts.file={tmp_path}/owls.txt", f"{ONE}.sampling.steps=3", f"{ONE}.sampling.guidance=1"]
    config = load([EXPERIMENT, *words])
    validate(config)
    own = sets_of(config)["one"].sampling
    assert (own.steps, own.guidance, own.eta) == (3, 1.0, config.sampling.eta)
    assert plan_of(config, ["a cat"]).all_prompts == ("a cat", "an owl", "an owl at night")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["evaluation.sets.train.count=4"], "evaluation.sets.train: .* are that set's, rename yours"),
        (["evaluation.sets.Train.count=16"], "differ only in case"),
        (["evaluation.sets.a/b.count=4"], "evaluation.sets.a/b: 'a/b' cannot be an evaluation set"),
        ([f"{ONE}.count=0"], f"{ONE}.count=0 must be at least 1"),
        ([f"{ONE}.count=7"], f"{ONE}.count=7 is not divisible by buffer.order_size"),
        ([f"{ONE}.rewards=[beauty]"], rf"{ONE}.rewards=\['beauty'\] must be names of rewards.*: there are compress"),
        ([f"{ONE}.rewards=[]"], "must be names of rewards"),
        ([f"{ONE}.sampling.eta=-1"], f"{ONE}.sampling.eta=-1.0 must lie between 0 and 1"),
        ([f"{ONE}.prompts.set=nothing"], f"{ONE}.prompts.set=nothing is not a prompt set"),
        ([f"{ONE}.prompts.set=emoji_held_out", f"{ONE}.prompts.list=[a cat]"], f"{ONE}.prompts.set and .* are given"),
        (
            [*SECOND, "evaluation.rewards=[second]"],
            "evaluation.rewards leaves out compressibility, which is trained",
        ),
        (["evaluation.rewards=[beauty]"], r"evaluation.rewards=\['beauty'\] must be names of rewards"),
        (["rewards.judge.path=emoji_world.judged:Judged"], "would train on Emoji World's judge"),
        (["guard.best_by=train"], r"guard.best_by names 'train', which no evaluation measures: write <set>/<measure>"),
        (["guard.best_by=held_out/reward"], "guard.best_by names 'held_out/reward'"),
        (["guard.max_fall={train/beauty: 1}"], r"names 'train/beauty', .* one of its rewards \(compressibility\)"),
        (["guard.max_fall={train/reward: 0}"], "guard.max_fall of train/reward is 0"),
        (["evaluation.scales=[0.5]", "guard.best_by=scale_50/reward"], "guard.best_by names 'scale_50/reward'"),
        (["guard.max_fall.train/judge.setting=x"], "guard.max_fall"),
        (["run.replay=[a]", "run.mirror=file:///x"], "run.mirror=file:///x with a replay, which works in one process"),
        (["run.replay=[a]", "buffer.max_staleness=1"], "buffer.max_staleness=1 with a replay"),
        ([f"{ONE}.rewards=[second]", *SECOND, "guard.best_by=one/reward"], "guard.best_by names 'one/reward'"),
        (["evaluation.scales=[1.0]"], r"evaluation.scales holds 1: give hundredths between 0 and 1"),
        (["evaluation.scales=[0.255]"], r"evaluation.scales holds 0.255: give hundredths"),
        (["evaluation.scales=[0.5,0.5]"], "give each scale once"),
        (["evaluation.scales=[0.5]", "evaluation.sets.Scale_50.every=5"], "evaluation.scales makes the sets scale_50"),
        (["evaluation.sets.h.prompts.file=nowhere.txt"], "evaluation.sets.h.prompts.file=nowhere.txt cannot be read"),
        (["evaluation.scales=[0.5]", "evaluation.sets.scale_50.every=5"], "evaluation.scales makes the sets scale_50"),
        (["guard.patience=0"], "guard.patience=0 must be at least 1"),
        (["rewards.compressibility.weight=null"], "nothing to train on with rewards.compressibility.weight"),
        ([f"{ONE}.reward=[compressibility]"], f"there is no setting {ONE}.reward, did you mean {ONE}.rewards"),
    ],
)
def test_a_set_or_a_guard_that_cannot_be_is_refused(words: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        validate(load([EXPERIMENT, *words]))


def test_a_reward_that_nobody_trains_on_and_no_set_measures_is_left_out() -> None:
    assert list(load(["compressibility"]).rewards) == ["compressibility", "clip", "judge"]
    config = load(["compressibility", "evaluation.rewards=[compressibility,clip]"])
    validate(config)
    assert list(config.rewards) == ["compressibility", "clip"]
    kept = load([EXPERIMENT, *SECOND, "evaluation.rewards=[compressibility]", f"{ONE}.rewards=[second]"])
    assert list(kept.rewards) == ["compressibility", "second"]
