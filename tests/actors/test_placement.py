"""Where actors go on a cluster of two nodes: both on this machine, with as many CPUs as they say."""

import logging
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.exceptions import RayActorError

from actors import fleet as fleet_module
from actors import remote_buffer
from actors.buffer_actor import BufferActor
from actors.ending import judged
from actors.fleet import NODE_DIED, Fleet, Place, why_it_died
from actors.placement import beside_the_driver, node_lives, node_of, room_for_ranks
from common.errors import UserError
from conf.schema import LearnerConfig
from tests.buffer_toy import ONE_REWARD, PLAN, rules
from tests.running import TIMEOUT_S, wait_for


class Nobody:
    pass


class Loading:
    """An actor that does not get to the end of its start."""

    def __init__(self, begun: Path) -> None:
        begun.touch()
        time.sleep(10**6)


class Sick:
    """Its device fails before it can ask for work."""

    @judged
    def run(self, buffer: ray.actor.ActorHandle) -> None:
        raise MemoryError


class Working:
    def run(self, buffer: ray.actor.ActorHandle) -> None:
        time.sleep(10**6)


class Hanging:
    def get(self, method: str) -> None:
        time.sleep(10**6)


Somebody: Any = ray.remote(Nobody)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """The driver's node has one CPU, the other two."""
    # Its name is short, for Ray's sockets.
    with tempfile.TemporaryDirectory(prefix="ddpo-") as temp, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", temp)  # where ray.init notes the address, in a folder that has to be there
        head = {"num_cpus": 1, "temp_dir": f"{temp}/ray", "object_store_memory": 100_000_000}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            cluster.add_node(num_cpus=2, object_store_memory=100_000_000)
            ray.init(cluster.address, log_to_driver=False, logging_level=logging.ERROR)
            yield cluster
        finally:
            ray.shutdown()
            cluster.shutdown()


def node_ids(*actors: ray.actor.ActorHandle) -> list[str]:
    return ray.get([node_of(actor) for actor in actors], timeout=TIMEOUT_S)


def here() -> str:
    return ray.get_runtime_context().get_node_id()


def test_the_learner_has_its_room_beside_the_run_folder_whoever_waits(cluster: Cluster) -> None:
    options = room_for_ranks(LearnerConfig(num_cpus=1.0, num_gpus=0.0))
    others = [Somebody.options(num_cpus=1).remote() for _ in range(3)]  # more than there is room for
    assert here() not in node_ids(*others[:2])
    for _ in range(2):  # the second takes the place of the first, before any that wait
        learner = Somebody.options(num_cpus=1, **options).remote()
        assert node_ids(learner) == [here()]
        ray.kill(learner)
    assert node_ids(Somebody.options(**beside_the_driver()).remote()) == [here()]


def test_ranks_that_do_not_fit_beside_it_go_where_there_is_room(cluster: Cluster) -> None:
    options = room_for_ranks(LearnerConfig(count=2, num_cpus=1.0, num_gpus=0.0))
    ranks = [Somebody.options(num_cpus=1, **options).remote() for _ in range(2)]
    assert here() not in node_ids(*ranks)


def test_a_node_that_is_gone_lives_no_more(cluster: Cluster) -> None:
    node = cluster.add_node(num_cpus=8, object_store_memory=100_000_000)
    (there,) = node_ids(Somebody.options(num_cpus=4).remote())
    assert node_lives(there) and there != here()
    cluster.remove_node(node)
    assert not node_lives(there)


def test_an_actor_that_was_still_loading_died_with_its_node(cluster: Cluster, tmp_path: Path) -> None:
    doomed = cluster.add_node(num_cpus=1, resources={"doomed": 1}, object_store_memory=100_000_000)
    start: Any = ray.remote(resources={"doomed": 1})
    actor = start(Loading).remote(tmp_path / "begun")
    wait_for("an actor that loads", (tmp_path / "begun").exists)
    cluster.remove_node(doomed, allow_graceful=False)
    with pytest.raises(RayActorError) as death:
        ray.get(actor.__ray_ready__.remote(), timeout=TIMEOUT_S)
    assert why_it_died(death.value) == NODE_DIED


def test_a_call_of_an_actor_that_hangs_ends(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """It lives and does not answer, as a buffer whose disk hangs."""
    monkeypatch.setattr(remote_buffer, "PATIENCE_S", 1.0)
    start: Any = ray.remote(num_cpus=0)
    actor = start(Hanging).remote()
    ray.get(actor.__ray_ready__.remote(), timeout=TIMEOUT_S)
    with pytest.raises(remote_buffer.BufferSilent, match="has not answered for 1 s"):
        remote_buffer.RemoteBuffer(actor).current()
    ray.kill(actor)


def test_a_place_that_always_fails_ends_the_run_only_if_all_of_its_kind_do(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet_module, "LONGEST_DELAY_S", 0.0)
    start: Any = ray.remote(num_cpus=0, max_task_retries=0)
    buffer = start(BufferActor).options(**beside_the_driver()).remote(tmp_path / "run", PLAN, rules(), ONE_REWARD)
    fleet = Fleet(remote_buffer.RemoteBuffer(buffer))
    fleet.add(Place("sampler-0", lambda worker: [start(Working).remote()]))
    fleet.add(Place("sampler-1", lambda worker: [start(Sick).remote()]))

    def deaths(count: int) -> bool:
        fleet.tend([], {})
        return len([note for note in fleet.notes if note.startswith("sampler-1.")]) >= count

    wait_for("seven deaths", lambda: deaths(7))
    fleet.remove(fleet.places[0])
    with pytest.raises(
        UserError, match=r"sampler-1 failed \d+ times in a row before it had made anything; .*MemoryError"
    ):
        wait_for("the end", lambda: deaths(100))
    fleet.end()
    ray.kill(buffer)


def test_who_is_late_is_said_to_be_so(cluster: Cluster, tmp_path: Path) -> None:
    start: Any = ray.remote(num_cpus=0, max_task_retries=0)
    buffer = start(BufferActor).options(**beside_the_driver()).remote(tmp_path / "run", PLAN, rules(), ONE_REWARD)
    fleet = Fleet(remote_buffer.RemoteBuffer(buffer))
    fleet.add(Place("reward-size-0", lambda worker: [start(Working).remote()]))

    def notes() -> list[str]:
        fleet.tend(["reward-size-0.0"], {"reward-size-0.0": {}})
        return fleet.notes

    assert "died (it took longer than rewards.size.timeout_s allows)" in wait_for("a death", notes)[0]
    fleet.end()
    ray.kill(buffer)


def test_who_is_killed_for_memory_is_replaced_like_any_other_dead(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a node whose memory monitor takes any use for too much."""
    monkeypatch.setenv("RAY_memory_usage_threshold", "0.0001")
    cluster.add_node(num_cpus=1, resources={"full": 1}, object_store_memory=100_000_000)
    monkeypatch.undo()
    start: Any = ray.remote(max_task_retries=0)
    buffer = start(BufferActor).options(**beside_the_driver()).remote(tmp_path / "run", PLAN, rules(), ONE_REWARD)
    fleet = Fleet(remote_buffer.RemoteBuffer(buffer))
    fleet.add(Place("sampler-0", lambda worker: [start(Working).options(resources={"full": 1}).remote()]))

    def notes() -> list[str]:
        fleet.tend([], {"sampler-0.0": {}})
        return fleet.notes

    wait_for("a death", notes)
    fleet.end()
    assert fleet.notes[0].startswith("sampler-0.0 died (OutOfMemoryError: "), fleet.notes
