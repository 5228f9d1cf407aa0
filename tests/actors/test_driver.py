"""What the driver does about news, requests, silence and death: the real driver and buffer over a stand-in of Ray."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayActorError

from actors.driver import SILENT_S, Driver
from actors.remote_buffer import PATIENCE_S
from buffer.orders import FixedSet, Plan
from buffer.settings import rules_of
from common.errors import RunStopped, UserError
from conf.load import from_file, load
from conf.resume import save_config
from conf.scale import REFUSED, REQUEST
from conf.schema import Config
from mirror.mirroring import Mirroring
from tests.actors.ray_stand_in import Actor, Call, Clock, Ray, stand_in
from tests.running import EXPERIMENT, SMALL

PROMPTS = ["a cat", "two dogs", "a horse on the beach"]


class Run:
    """A driver and what is around it."""

    def __init__(self, folder: Path, ray: Ray, clock: Clock, *settings: str) -> None:
        self.ray, self.clock = ray, clock
        without_room = ["samplers.num_gpus=0", "learner.num_gpus=0", "learner.num_cpus=0", f"run.dir={folder}"]
        self.config: Config = load([EXPERIMENT, *SMALL, *without_room, "run.name=run", *settings])
        self.folder = folder / "run"
        save_config(self.folder, self.config, PROMPTS)
        plan = Plan(0, tuple(PROMPTS), 8, 2, (FixedSet("train", 4, tuple(PROMPTS)),))
        self.driver = Driver(self.config, self.folder, plan, Mirroring(None, rules_of(self.config).served))
        self.said: list[str] = []

    def start(self) -> None:
        self.driver.try_rewards((64, 64), self.said.append)
        self.driver.start()

    @property
    def buffer(self) -> Any:
        return self.ray.made["buffer"]

    @property
    def notes(self) -> list[str]:
        return self.driver.fleet.notes

    def places(self) -> list[str]:
        return sorted(place.name for place in self.driver.fleet.places)

    def steps(self, seconds: float) -> None:
        """One each second."""
        for _ in range(int(seconds)):
            self.clock.now += 1
            self.driver.step()


@pytest.fixture
def begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    ray, clock = stand_in(monkeypatch)
    runs: list[Run] = []

    def begin(*settings: str, started: bool = True) -> Run:
        runs.append(Run(tmp_path, ray, clock, *settings))
        if started:
            runs[-1].start()
        return runs[-1]

    yield begin
    for run in runs:
        run.driver.__exit__()
        assert all(actor.killed for actor in ray.made.values()), "each ends what it started"


def test_the_actors_are_those_of_the_settings_and_a_tried_reward_is_not_made_again(begin: Any) -> None:
    run = begin("samplers.count=2", "rewards.compressibility.count=2")
    workers = ["learner-0", "reward-compressibility-0", "reward-compressibility-1", "sampler-0", "sampler-1"]
    assert run.places() == workers
    assert [*run.ray.made] == [
        "reward-compressibility-0.0",  # tried
        "buffer",
        "learner-0.0",
        "reward-compressibility-1.0",
        "sampler-0.0",
        "sampler-1.0",
    ]


def test_each_rank_of_the_learner_is_told_where_the_first_one_waits(begin: Any) -> None:
    run = begin("learner.count=3")
    ranks = [run.ray.made[f"learner-{rank}.0"] for rank in range(3)]
    assert [rank.arguments[:3] for rank in ranks] == [(f"learner-{n}.0", "learner-0.0", n) for n in range(3)]
    assert len(ranks[0].arguments) == 4
    assert all(rank.arguments[4] is ranks[0].answers["meet"] for rank in ranks[1:])
    assert run.places()[0] == "learner-0" and run.places()[1].startswith("reward")  # one place for all of them


def test_a_request_changes_the_counts_and_is_saved(begin: Any) -> None:
    run = begin()
    for counts, there in (("{count: 3}", [0, 1, 2]), ("{count: 1}", [0]), ("{count: 2}", [0, 1])):
        (run.folder / REQUEST).write_text(f"samplers: {counts}\n")
        run.driver.step()
        assert [place for place in run.places() if place.startswith("sampler")] == [f"sampler-{n}" for n in there]
        assert from_file(run.folder / "config.yaml").samplers.count == len(there)
        assert not (run.folder / REQUEST).exists()
    assert run.ray.made["sampler-1.0"].killed and not run.ray.made["sampler-1.1"].killed
    assert "samplers.count 3 -> 1" in " ".join(run.notes) and "died" not in " ".join(run.notes)


@pytest.mark.parametrize("content", ["samplers: {count: 2", "", "samplers: {count: 0}\n", "learner: {lr: 1}\n"])
def test_a_bad_request_is_set_aside_and_changes_nothing(content: str, begin: Any) -> None:
    run = begin()
    before, saved = run.places(), (run.folder / "config.yaml").read_bytes()
    (run.folder / REQUEST).write_text(content)
    run.steps(2)
    assert run.places() == before and (run.folder / "config.yaml").read_bytes() == saved
    assert len(list(run.folder.glob(REFUSED))) == 1 and not (run.folder / REQUEST).exists()
    assert len([note for note in run.notes if "is set aside" in note]) == 1


def test_a_buffer_that_does_not_answer_is_said_once_and_waited_for(begin: Any) -> None:
    run = begin()
    run.buffer.silent = True
    run.steps(SILENT_S + 1)
    assert not run.notes
    run.steps(30)
    (note,) = run.notes
    assert "the buffer does not answer: does the disk of" in note
    run.buffer.silent = False
    run.driver.polled.answer = run.driver.news  # what was asked is answered after all
    run.steps(2)
    assert run.notes[1:] == ["the buffer answers again, after 46 s"]


def test_a_buffer_that_never_answers_ends_the_run(begin: Any) -> None:
    run = begin()
    run.buffer.silent = True
    with pytest.raises(RunStopped, match=r"has not answered for 30\d s: does the disk of the run folder hang"):
        run.steps(PATIENCE_S + 10)


def test_a_buffer_that_died_for_good_ends_the_run_with_its_own_reason(begin: Any) -> None:
    run = begin()
    run.buffer.failing = RayActorError(error_msg="The actor died.\ncommon.errors.UserError: the journal x is damaged")
    with pytest.raises(RunStopped, match="the buffer died and did not come back: the journal x is damaged"):
        run.steps(2)


def test_a_buffer_that_restarts_is_asked_again_and_told_again_to_drain(begin: Any) -> None:
    run = begin()
    run.driver.drain()
    run.steps(2)
    assert run.driver.step().draining
    run.buffer.restart()
    assert not run.buffer.real.draining
    run.driver.polled = Call(ActorUnavailableError("it restarts", b"x" * 16))
    news = run.driver.step()
    assert news.epoch == 2
    run.steps(2)
    assert run.driver.step().draining


def test_a_reason_to_stop_ends_the_run_and_is_recorded(begin: Any) -> None:
    run = begin()
    run.buffer.real.stop = "the disk is full"
    with pytest.raises(RunStopped, match="the disk is full"):
        run.steps(2)
    (sitting,) = json.loads((run.folder / "run.json").read_text())["sittings"].values()
    assert sitting["restarts"] == 0


def test_a_dead_worker_is_replaced_and_the_buffer_hears_of_it(begin: Any) -> None:
    run = begin()
    run.ray.made["sampler-0.0"].work.answer = ActorDiedError()
    run.steps(3)
    assert "sampler-0.1" in run.ray.made and "sampler-0.0" in run.buffer.real.dead
    run.clock.now += 31  # run.json is written every half minute
    run.steps(1)
    assert json.loads((run.folder / "run.json").read_text())["sittings"]["1"]["restarts"] == 1


def trial(answer: Any) -> Any:
    def before(name: str, actor: Actor) -> None:
        actor.answers["prepare"] = answer

    return before


def test_a_reward_that_is_no_good_ends_the_run_before_it_begins(begin: Any) -> None:
    run = begin(started=False)
    run.ray.before = trial(Call("Reward compressibility gave nan; mend it."))
    with pytest.raises(UserError, match="gave nan; mend it"):
        run.start()
    assert not (run.folder / "journal").exists()


def test_a_reward_that_dies_while_it_is_tried_is_named(begin: Any) -> None:
    run = begin(started=False)
    run.ray.before = trial(Call(ActorDiedError()))
    with pytest.raises(UserError, match="reward-compressibility-0 died while it was tried"):
        run.start()


def test_a_reward_that_loads_for_long_is_named(begin: Any) -> None:
    run, loading = begin(started=False), Call()
    run.ray.before = trial(loading)

    def say(sentence: str) -> None:
        run.said.append(sentence)
        loading.answer = None

    run.driver.try_rewards((64, 64), say)
    assert run.said == ["reward-compressibility-0: still loading, or without room in the cluster; Ctrl-C ends the run"]
