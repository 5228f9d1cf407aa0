"""Objectives and advantages of a user's own, by module:Class: what is made, and what is refused in which sentence."""

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common.errors import UserError
from conf.schema import Config
from learner.advantages import Advantage
from learner.objectives.objective import Objective
from learner.registry import make_advantage, make_objective

OWN = """
from common.errors import UserError
from learner.advantages import Advantage, ByBatch
from learner.objectives.ddpo import ImportanceSampling
from learner.objectives.objective import Objective

class Good(ImportanceSampling):
    takes_stale_data = False

    def __init__(self, config, seed, strength, more: int = 1):
        super().__init__(config, seed)
        self.strength = strength

class Annotated(ImportanceSampling):
    def __init__(self, config, seed, names: list[str], share: float | None = 0.5, of: "int" = 1):
        super().__init__(config, seed)

class Bare(ImportanceSampling): pass

class Misspelt(ImportanceSampling):
    needs = "step"

class Unfinished(Objective): pass

class GoodAdvantage(ByBatch):
    def __init__(self, config, strength, more: int = 1):
        super().__init__(config)
        self.strength = strength

class BareAdvantage(ByBatch): pass

class UnfinishedAdvantage(Advantage): pass

class RaisesAdvantage(ByBatch):
    def __init__(self, *given): raise KeyError("strength")

class ExitsAdvantage(ByBatch):
    def __init__(self, *given): raise SystemExit(3)

class SaysAdvantage(ByBatch):
    def __init__(self, *given): raise UserError("strength has to be positive.")

class NoChild:
    def __init__(self, *given): pass

class Raises(ImportanceSampling):
    def __init__(self, *given): raise KeyError("strength")

class Exits(ImportanceSampling):
    def __init__(self, *given): raise SystemExit(3)

class Says(ImportanceSampling):
    def __init__(self, *given): raise UserError("strength has to be positive.")

def function(*given): pass
"""
MODULE = "own_classes_of_a_test"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's file lies in the working directory; another that cannot be imported, too."""
    (tmp_path / f"{MODULE}.py").write_text(OWN)
    (tmp_path / "broken_file_of_a_test.py").write_text("import no_such_library_of_a_test")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, MODULE, raising=False)


def objective(path: str, **args: Any) -> Objective:
    config = Config()
    config.run.seed = 7
    config.learner.optimizer_steps = 1
    config.learner.objective, config.learner.objective_args = path, args
    return make_objective(config)


def advantage(path: str, **args: Any) -> Advantage:
    config = Config()
    config.learner.advantage, config.learner.advantage_args = path, args
    return make_advantage(config)


KINDS: list[tuple[str, Callable[..., Any], str]] = [("objective", objective, ""), ("advantage", advantage, "Advantage")]
BASES = {"objective": "learner.objectives.objective.Objective", "advantage": "learner.advantages.Advantage"}
BUILT_IN = {
    "objective": "awm, ddpo_decoupled, ddpo_is, ddpo_sf, nft, rwr, rwr_sparse",
    "advantage": "by_batch, by_group, per_prompt",
}
NAMED = {"objective": "ddpo_is", "advantage": "by_group"}


@pytest.mark.parametrize(("kind", "make", "ending"), KINDS)
def test_a_class_of_the_users_own_is_made_with_its_args(kind: str, make: Callable[..., Any], ending: str) -> None:
    made = make(f"{MODULE}:Good{ending}", strength=0.5)
    assert made.strength == 0.5 and made.config.optimizer_steps == (1 if kind == "objective" else 2)
    assert kind == "advantage" or made.seed == 7
    assert type(make(f"{MODULE}:Bare{ending}")).__name__ == f"Bare{ending}"


@pytest.mark.parametrize("name", ["ddpo_is", "ddpo_sf"])
def test_steps_without_noise_are_for_losses_on_clean_pictures(name: str) -> None:
    config = Config()
    config.sampling.eta = 0.0
    config.learner.optimizer_steps = 1
    config.learner.objective = "nft"
    make_objective(config)
    config.learner.objective = name
    with pytest.raises(UserError, match=r"sampling\.eta=0"):
        make_objective(config)


@pytest.mark.parametrize(("kind", "make", "ending"), KINDS)
def test_what_is_refused_and_how(kind: str, make: Callable[..., Any], ending: str) -> None:
    own, setting = f"learner.{kind}={MODULE}", f"learner.{kind}_args"
    base = BASES[kind]
    refused: list[tuple[str, dict[str, Any], str]] = [
        ("ppo", {}, f"learner.{kind}=ppo is neither built in ({BUILT_IN[kind]}) nor of the form module:Class, for"),
        (f"{MODULE}.Good", {}, f"{own}.Good is neither built in"),
        ("nowhere:Mine", {}, f"learner.{kind}=nowhere:Mine: there is no module nowhere; put nowhere.py into"),
        (f"{MODULE}:Nobody", {}, f"{own}:Nobody: {Path.cwd()}/{MODULE}.py has no Nobody; it has "),
        (f"{MODULE}:function", {}, f"{own}:function: function is a function, not a class; give a class with a method"),
        ("broken_file_of_a_test:Mine", {}, "needs no_such_library_of_a_test, which is not there; install it."),
        (f"{MODULE}:NoChild", {}, f"{own}:NoChild is no {kind.title()}; let the class inherit from {base}."),
        (f"{MODULE}:Good{ending}", {}, f"{setting}={{}} do not fit {MODULE}:Good{ending}: missing a required argument"),
        (f"{MODULE}:Good{ending}", {"strength": 1, "size": 2}, "got an unexpected keyword argument 'size'; change the"),
        (f"{MODULE}:Bare{ending}", {"size": 2}, f"{setting}={{'size': 2}} do not fit {MODULE}:Bare{ending}: got an"),
        (NAMED[kind], {"size": 2}, f"{setting}={{'size': 2}} do not fit {NAMED[kind]}: got an unexpected"),
        (f"{MODULE}:Unfinished{ending}", {}, f"learner.{kind} ({MODULE}:Unfinished{ending}) cannot be made: TypeError"),
        (f"{MODULE}:Good{ending}", {"strength": 1, "more": []}, f"{setting}.more"),
        (f"{MODULE}:Raises{ending}", {}, f"learner.{kind} ({MODULE}:Raises{ending}) cannot be made: KeyError"),
        (
            f"{MODULE}:Exits{ending}",
            {},
            f"learner.{kind} ({MODULE}:Exits{ending}) cannot be made: SystemExit: 3 ({MODULE}",
        ),
        (f"{MODULE}:Says{ending}", {}, f"learner.{kind}: strength has to be positive."),
    ]
    for path, args, says in refused:
        with pytest.raises(UserError) as raised:
            make(path, **args)
        sentence = str(raised.value)
        assert says in sentence and "\n" not in sentence and len(sentence) <= 500, (says, sentence)


def test_an_error_of_the_device_is_nobodys_mistake() -> None:
    Path(f"{MODULE}.py").write_text(OWN.replace("KeyError", "MemoryError"))
    for make, ending in ((objective, ""), (advantage, "Advantage")):
        with pytest.raises(MemoryError, match="strength"):
            make(f"{MODULE}:Raises{ending}")


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ({"names": ["a"], "share": None, "of": "text"}, ""),  # lists, and names of types, are the class's own to check
        ({"names": 3, "share": 1}, ""),
        ({"names": [], "share": "half"}, "learner.objective_args.share=half must be a finite number or null"),
        ({"names": [], "share": float("inf")}, "share=inf must be a finite number or null"),
        ({"names": [], "share": True}, "share=True must be a finite number or null"),
    ],
)
def test_arguments_are_held_against_plain_annotations(args: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says) if says else contextlib.nullcontext():
        objective(f"{MODULE}:Annotated", **args)


def test_an_objective_says_what_it_needs_in_a_word_that_there_is() -> None:
    with pytest.raises(UserError, match=f"learner.objective={MODULE}:Misspelt has needs='step'; set"):
        objective(f"{MODULE}:Misspelt")


def test_an_objective_of_fresh_data_alone_is_held_to_it() -> None:
    config = Config()
    config.learner.objective, config.learner.objective_args = f"{MODULE}:Good", {"strength": 1}
    assert config.learner.optimizer_steps == 2
    with pytest.raises(
        UserError, match=f"learner.objective={MODULE}:Good with learner.optimizer_steps=2: its gradient"
    ):
        make_objective(config)
