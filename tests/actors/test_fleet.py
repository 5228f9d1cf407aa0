"""Who is replaced, when, and when no more: the real fleet over a stand-in of Ray, whose actors end as a test says.

The same with real actors that die: test_placement.py and the real runs.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, OutOfMemoryError, RayActorError, RayTaskError

from actors import fleet as fleet_module
from actors.ending import WorkerFailed
from actors.fleet import NODE_DIED, Fleet, Place
from buffer.protocol import Charged
from common.errors import RunStopped, UserError
from tests import buffer_toy
from tests.actors.ray_stand_in import HERE, THERE, Actor, Call, Clock, Ray, stand_in


@dataclass
class World:
    """A fleet, the actors that it started, the clock, and what the buffer heard of the dead."""

    ray: Ray
    clock: Clock
    fleet: Fleet
    deaths: list[tuple[str, Charged]]
    actors: dict[str, Actor] = field(default_factory=dict)  # by worker

    def place(self, name: str, host: Call | None = None) -> Place:
        def start(worker: str) -> list[Any]:
            self.actors[worker] = Actor(host=host)
            return [self.actors[worker]]

        place = Place(name, start)
        self.fleet.add(place)
        return place

    def tend(self, overdue: tuple[str, ...] = (), heard: dict[str, dict[str, float]] | None = None) -> None:
        self.fleet.tend(overdue, heard if heard is not None else {worker: {} for worker in self.actors})

    def lasts(self, seconds: float) -> None:
        self.clock.now += seconds

    def dies(self, worker: str, error: Exception | None = None, **tending: Any) -> None:
        self.actors[worker].work.answer = error or ActorDiedError()
        self.tend(**tending)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """The buffer is a real one, without its actor."""
    buffer: Any = buffer_toy.buffer(tmp_path / "run")
    buffer.actor = None
    deaths: list[tuple[str, Charged]] = []
    tell = buffer.worker_died

    def worker_died(worker: str, charged: Charged) -> None:
        deaths.append((worker, charged))
        tell(worker, charged)

    monkeypatch.setattr(buffer, "worker_died", worker_died)
    world = World(*stand_in(monkeypatch), Fleet(buffer), deaths)
    yield world
    buffer.close()


def task_error(cause: Exception) -> RayTaskError:
    return RayTaskError("run", "a traceback", cause)


def test_the_next_worker_waits_longer_each_time_until_one_was_healthy(world: World) -> None:
    place = world.place("sampler-0")
    waits = []
    for number in range(8):
        world.dies(f"sampler-0.{number}")
        assert not place.actors
        waits.append(place.restart_at - world.clock.now)
        world.lasts(waits[-1] - 0.1)
        world.tend()
        assert not place.actors, "too early"
        world.lasts(0.1)
        world.tend()
        assert place.worker == f"sampler-0.{number + 1}" and place.actors
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60]
    world.lasts(fleet_module.HEALTHY_S)
    world.dies("sampler-0.8")
    assert place.restart_at - world.clock.now == 1
    assert world.fleet.restarts == {"sampler-0": 8}
    assert world.fleet.notes[0].startswith("sampler-0.0 died (") and "in 1 s" in world.fleet.notes[0]


@pytest.mark.parametrize(
    ("error", "cause", "charged"),
    [
        (task_error(WorkerFailed("ValueError: no face", False)), "ValueError: no face", "work"),
        (task_error(WorkerFailed("MemoryError", True)), "MemoryError", "device"),
        (
            OutOfMemoryError("Task was killed: its node runs low on memory.\nadvice"),
            "OutOfMemoryError: ",
            "device",
        ),
        (ActorDiedError(), "died", "work"),
    ],
    ids=["its work", "its memory", "Ray's memory monitor", "killed"],
)
def test_the_buffer_hears_whose_fault_a_death_is(error: Exception, cause: str, charged: Charged, world: World) -> None:
    world.place("sampler-0")
    world.dies("sampler-0.0", error)
    assert world.deaths == [("sampler-0.0", charged)]
    assert cause in world.fleet.notes[0]
    assert world.actors["sampler-0.0"].killed


@pytest.mark.parametrize("error", [RunStopped("the disk is full"), UserError("model.path is no model")])
def test_what_no_restart_mends_is_raised_as_it_was(error: Exception, world: World) -> None:
    world.place("sampler-0")
    with pytest.raises(type(error), match=str(error)):
        world.dies("sampler-0.0", task_error(error))


def test_who_is_late_is_killed_and_said_to_be_so(world: World) -> None:
    world.place("sampler-0")
    world.tend(overdue=("sampler-0.0",))
    assert world.actors["sampler-0.0"].killed
    world.dies("sampler-0.0", overdue=("sampler-0.0",))
    assert "it took longer than twice buffer.claim_timeout_s allows" in world.fleet.notes[0]
    assert world.deaths == [("sampler-0.0", "work")]


def test_who_dies_with_its_host_is_blameless_and_does_not_count(world: World) -> None:
    place = world.place("sampler-0", host=Call(THERE))
    world.ray.hosts.remove(THERE)
    for number in range(2 * fleet_module.MOST_FAILED_STARTS):
        world.dies(f"sampler-0.{number}", heard={})
        world.lasts(60)
        world.tend()
    assert set(world.deaths) == {(f"sampler-0.{number}", "nobody") for number in range(10)}
    assert (place.failed_starts, place.fruitless) == (0, 0)
    assert "(with its host)" in world.fleet.notes[0]


def test_one_that_never_ran_on_a_host_that_is_gone_died_with_it(world: World) -> None:
    world.place("sampler-0", host=Call())
    said = f"The actor died unexpectedly.\n\tclass_name: Sampler\n{NODE_DIED}. Node Id: 5f\nThe actor never ran."
    world.dies("sampler-0.0", RayActorError(error_msg=said))
    assert world.deaths == [("sampler-0.0", "nobody")] and "(with its host)" in world.fleet.notes[0]


def test_a_broken_connection_is_no_death_until_it_stays_silent(world: World) -> None:
    place = world.place("sampler-0")
    world.dies("sampler-0.0", ActorUnavailableError("no answer", b"x" * 16))
    assert place.actors and not world.deaths
    world.lasts(fleet_module.SILENCE_S)
    world.tend()
    assert place.actors, "not yet"
    world.lasts(1)
    world.tend()
    assert world.deaths == [("sampler-0.0", "device")]
    assert "it has not answered for 30 s" in world.fleet.notes[0]


def failing(world: World, workers: dict[str, int], error: Exception, heard: dict[str, dict[str, float]]) -> None:
    """The workers of these places die, so often each, one after the other."""
    for number in range(max(workers.values())):
        for name, times in workers.items():
            if number < times:
                world.dies(f"{name}.{number}", error, heard=heard)
        world.lasts(60)
        world.tend(heard=heard)


def test_a_role_that_never_gets_to_ask_for_work_ends_the_run(world: World) -> None:
    world.place("sampler-0")
    failing(world, {"sampler-0": 4}, ActorDiedError(), {})
    with pytest.raises(UserError, match="sampler-0 died 5 times in a row before it could ask for work; the last cause"):
        world.dies("sampler-0.4", heard={})


def test_a_role_whose_device_fails_before_it_made_anything_ends_the_run(world: World) -> None:
    world.place("reward-a-0")
    sick = task_error(WorkerFailed("CUDA error", True))
    heard = {f"reward-a-0.{number}": {"scoring": 1.0} for number in range(9)}
    failing(world, {"reward-a-0": 4}, sick, heard)
    with pytest.raises(UserError, match=r"reward-a-0 failed 5 times in a row before it had made anything; .*CUDA"):
        world.dies("reward-a-0.4", sick, heard=heard)


def test_what_was_handed_in_begins_the_count_anew(world: World) -> None:
    place = world.place("sampler-0")
    sick = task_error(WorkerFailed("CUDA error", True))
    failing(world, {"sampler-0": 4}, sick, {})
    assert place.fruitless == 4
    world.tend(heard={"sampler-0.4": {"handing in": 0.1}})
    assert place.fruitless == 0
    assert place.failed_starts == 4


def test_while_one_of_its_kind_works_a_place_is_filled_again_and_again(world: World) -> None:
    world.place("sampler-0")
    world.place("sampler-1")
    world.place("reward-a-0")
    failing(world, {"sampler-1": 12}, ActorDiedError(), {})
    with pytest.raises(UserError, match="and so did all others of its kind"):
        failing(world, {"sampler-0": 5}, ActorDiedError(), {})


def test_without_room_it_is_said_once_and_the_rest_goes_on(world: World) -> None:
    host = Call()
    place = world.place("sampler-0", host=host)
    world.lasts(fleet_module.ROOM_S + 1)
    world.tend()
    world.tend()
    assert len(world.fleet.notes) == 1 and "sampler-0.0 has not started for 60 s" in world.fleet.notes[0]
    host.answer = HERE
    world.tend()
    assert place.created is None and place.started_at == world.clock.now


def test_a_place_that_comes_back_has_names_of_its_own(world: World) -> None:
    world.fleet.remove(world.place("sampler-1"))
    assert world.actors["sampler-1.0"].killed and world.deaths == [("sampler-1.0", "nobody")]
    assert world.place("sampler-1").worker == "sampler-1.1"
    assert world.fleet.restarts == {"sampler-1": 0}


def test_of_ranks_that_ended_together_a_death_says_more_than_an_exception(world: World) -> None:
    ranks = [Actor(), Actor()]
    place = Place("learner-0", lambda worker: [*ranks])  # type: ignore[list-item]
    world.fleet.add(place)
    ranks[0].work.answer = task_error(WorkerFailed("RuntimeError: Connection closed by peer", False))
    ranks[1].work.answer = OutOfMemoryError("Task was killed")
    world.tend(heard={"learner-0.0": {}})
    assert world.deaths == [("learner-0.0", "device")]
    assert "OutOfMemoryError" in world.fleet.notes[0]
    assert all(rank.killed for rank in ranks)


def test_the_end_is_the_end_of_all(world: World) -> None:
    world.place("sampler-0")
    world.place("learner-0")
    world.fleet.end()
    assert all(actor.killed for actor in world.actors.values())
