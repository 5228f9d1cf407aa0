"""The guard on histories that are made up: what it must say of each."""

import math
from typing import Any

import pytest

from conf.load import load
from conf.schema import GuardAction, GuardConfig
from evaluation.guard import Measured, Seen, Verdict, best_by, halvings, judge, stops
from evaluation.history import history
from tests.running import EXPERIMENT

BEST_BY = "train/reward"


def seen(**curves: list[float | None]) -> list[Seen]:
    """Versions 0, 10, 20, ...: `reward` and `clip` of the set train with a std of 1 and 0.5, and `kl`."""
    found = []
    for place in range(max(map(len, curves.values()))):
        now = {name: values[place] for name, values in curves.items() if place < len(values)}
        kl = now.pop("kl", None)
        stds = {"reward": 1.0, "clip": 0.5}
        measured = {f"train/{name}": Measured(value, stds[name]) for name, value in now.items() if value is not None}
        found.append(Seen(10 * place, measured, kl))
    return found


def verdict(curves: list[Seen], **settings: Any) -> Verdict:
    return judge(curves, GuardConfig(**settings), BEST_BY)


# what it is called, settings, history, the best version, versions at which something is wrong
HISTORIES: list[tuple[str, dict[str, Any], list[Seen], int, list[int]]] = [
    ("nothing yet", {"patience": 1}, [], 0, []),
    ("only the base", {"patience": 1}, seen(reward=[1.0]), 0, []),
    ("rises for ever", {"patience": 1, "max_fall": {"train/clip": 1}}, seen(reward=[1, 2, 3], clip=[1, 1, 1]), 20, []),
    ("falls and comes back within patience", {"patience": 2}, seen(reward=[1, 2, 1.5, 3]), 30, []),
    ("falls beyond patience", {"patience": 2}, seen(reward=[1, 2, 1.5, 1.9, 1.0]), 10, [30, 40]),
    ("equal is not better", {"patience": 1}, seen(reward=[2, 2]), 0, [10]),
    ("without patience", {}, seen(reward=[3, 2, 1, 0]), 0, []),
    ("a second reward falls just within its limit", {"max_fall": {"train/clip": 1}}, seen(clip=[1, 0.5]), 0, []),
    ("and beyond it", {"max_fall": {"train/clip": 1}}, seen(reward=[1, 2, 3], clip=[1, 0.8, 0.4]), 10, [20]),
    ("from its highest", {"max_fall": {"train/clip": 1}}, seen(reward=[1, 2, 3], clip=[1, 2, 1.4]), 10, [20]),
    ("in stds of version 0, of which 0 allows no fall", {"max_fall": {"train/clip": 1}},
     [Seen(0, {"train/clip": Measured(1, 0)}), Seen(5, {"train/clip": Measured(0.99, 9)})], 0, [5]),
    ("what is beyond a limit is not the best", {"max_kl": 5}, seen(reward=[1, 2, 9], kl=[None, 4, 6]), 10, [20]),
    ("the KL comes back", {"max_kl": 5}, seen(reward=[1, 2, 3], kl=[None, 6, 4]), 20, [10]),
    ("a set that is not evaluated at every version", {"max_fall": {"train/clip": 1}, "patience": 2},
     seen(reward=[1, None, 2, None, 3], clip=[1, 0.9, None, 0.8]), 40, []),
]  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "curves", "best", "wrong"), [case[1:] for case in HISTORIES], ids=[case[0] for case in HISTORIES]
)
def test_what_the_guard_says(settings: dict[str, Any], curves: list[Seen], best: int, wrong: list[int]) -> None:
    found = verdict(curves, **settings)
    assert (found.best, list(found.wrong)) == (best, wrong)
    for length in range(len(curves)):  # what was wrong stays wrong, whatever comes later
        earlier = verdict(curves[:length], **settings)
        versions = {each.version for each in curves[:length]}
        assert earlier.wrong == {version: what for version, what in found.wrong.items() if version in versions}


def test_what_it_does_about_it() -> None:
    found = verdict(seen(reward=[1, 2, 1, 1]), patience=1)
    assert stops(found, GuardConfig(action=GuardAction.note)) == ""
    said = "guard: at version 20 train/reward has not been better than at version 10 for 1 evaluation"
    assert stops(found, GuardConfig(action=GuardAction.stop)) == said == found.sentences[0]
    assert [halvings(found, GuardConfig(action=action)) for action in GuardAction] == [0, 2, 0]
    good = verdict(seen(reward=[1, 2]), patience=1)
    assert stops(good, GuardConfig(action=GuardAction.stop)) == "" and not halvings(good, GuardConfig(GuardAction.slow))


def test_a_sentence_names_what_fell_by_how_much_and_the_limit() -> None:
    found = verdict(seen(clip=[1, 0.25], kl=[None, 12.5]), max_fall={"train/clip": 1}, max_kl=10)
    assert found.wrong[10] == [
        "train/clip has fallen by 1.50 standard deviations (guard.max_fall: 1)",
        "the KL to the base model is 12.5 nats a trajectory (guard.max_kl: 10)",
    ]


def test_what_is_watched_and_never_measured_is_said() -> None:
    limits = {"train/diversity": 1.0, "held_out/clip": 1.0}
    found = verdict(seen(reward=[1]), max_fall=limits)  # the set held_out may still come
    assert found.sentences == ["guard: train/diversity is watched, and no evaluation has measured it"]


def test_the_first_further_set_that_has_all_of_the_reward_names_the_best() -> None:
    second = [
        "rewards.second.path=incompressibility",
        "rewards.second.weight=null",
        "evaluation.sets.a.rewards=[second]",
    ]
    assert best_by(load([EXPERIMENT])) == "train/reward"
    assert best_by(load([EXPERIMENT, *second, "evaluation.sets.b.every=5", "evaluation.sets.c.every=5"])) == "b/reward"
    assert best_by(load([EXPERIMENT, *second, "guard.best_by=a/second"])) == "a/second"


def test_history_is_read_from_the_rows_of_metrics() -> None:
    rows = [
        {"version": 0, "time": 1.0, "evaluation/train/reward/mean": -2.0, "evaluation/train/reward/std": 0.5},
        {"batch": 0, "time": 2.0, "kl/base": 0.0},
        {"batch": 1, "time": 3.0, "kl/base": 0.25},
        {"version": 2, "time": 5.0, "evaluation/held_out/clip/mean": 0.3, "evaluation/held_out/pictures": 4.0},
        {"batch": 2, "time": 6.0, "kl/base": 0.5},
        {"version": 2, "time": 4.0, "evaluation/train/reward/mean": -1.0, "evaluation/train/reward/std": 0.25},
    ]
    assert history(rows) == [
        Seen(0, {"train/reward": Measured(-2.0, 0.5)}, None),
        Seen(2, {"held_out/clip": Measured(0.3, 0.0), "train/reward": Measured(-1.0, 0.25)}, 0.25),
    ]


def test_a_kl_that_is_no_number_any_more_is_beyond_any_limit() -> None:
    rows: list[dict[str, float]] = [{"batch": 0, "kl/base": 1.0}, {"batch": 1}]
    rows.append({"version": 2, "evaluation/train/reward/mean": 1.0})
    (found,) = history(rows)
    assert found.kl == math.inf and verdict([Seen(0, {}), found], max_kl=1e9).wrong
    never = verdict([Seen(0, {}), Seen(1, {"train/reward": Measured(1, 1)})], max_kl=5)
    assert never.sentences == ["guard: kl/base is watched, and no evaluation has measured it"]


def test_a_column_may_have_any_name() -> None:
    (found,) = history([{"version": 0, "evaluation/train/mine.a/b/mean": 1.0, "evaluation/train/mine.a/b/std": 0.5}])
    assert found.measures == {"train/mine.a/b": Measured(1.0, 0.5)}
