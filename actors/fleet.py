"""The fleet: which actors there are, who died, and when to start the next in its place."""

import contextlib
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import ray
from ray import ObjectRef
from ray.actor import ActorHandle
from ray.exceptions import ActorUnavailableError, OutOfMemoryError, RayActorError, RayError, RayTaskError

from actors.ending import WorkerFailed
from actors.placement import node_lives, node_of
from actors.remote_buffer import RemoteBuffer
from common.blame import describe
from common.errors import RunStopped, UserError

FIRST_DELAY_S = 1.0
LONGEST_DELAY_S = 60.0
HEALTHY_S = 60.0  # after a life of this length the delay is the shortest again
ROOM_S = 60.0  # a worker that takes longer to start is mentioned in a note
SILENCE_S = 30.0  # from a broken connection until a worker counts as dead; mostly the cluster knows sooner
NODE_DIED = "The actor died because its node has died"  # in Ray's words, also of an actor that never ran there
NEVER_RAN = "The actor never ran"
MOST_FAILED_STARTS = 5  # in a row at every place of a role, without once asking for work: no restart mends that
MOST_FRUITLESS = 5  # deaths in a row by device or memory at every place of a role, before a worker made anything
DELIVERIES = ("handing in", "saving")  # occupations of a worker that has made something


@dataclass
class Place:
    """A worker's place in the fleet: the role and index stay, the actors in it change.

    Most workers are one actor; the learner is a group of ranks, which live and die together.
    """

    name: str  # role and index, such as sampler-0 or reward-aesthetic-1
    start: Callable[[str], list[ActorHandle[Any]]]  # makes the actors of the worker of that name
    actors: list[ActorHandle[Any]] = field(default_factory=list)  # none while the place waits for its next worker
    running: list[ObjectRef[None]] = field(default_factory=list)  # of the actors' `run`, which ends only by a death
    nodes: list[ObjectRef[str]] = field(default_factory=list)  # ids of the nodes that the actors are on
    created: ObjectRef[str] | None = None  # ready when the actors exist; None once that was seen
    silent_since: float | None = None  # when a connection broke, as long as it is not known whether anyone died
    incarnation: int = 0
    started_at: float = 0.0
    restart_at: float = 0.0
    short_lives: int = 0  # in a row
    failed_starts: int = 0  # in a row
    fruitless: int = 0  # in a row
    late: bool = False  # killed, as it took longer than it may

    @property
    def role(self) -> str:
        return self.name.rpartition("-")[0]

    @property
    def index(self) -> int:
        return int(self.name.rpartition("-")[2])

    @property
    def worker(self) -> str:
        """The worker's name. A driver uses none twice, so that news of a dead worker never count for the next."""
        return f"{self.name}.{self.incarnation}"

    @property
    def time_limit(self) -> str:
        """The setting that limits its time."""
        role = self.role
        if role == "sampler":
            return "twice buffer.claim_timeout_s"
        return "learner.timeout_s" if role == "learner" else f"rewards.{role.removeprefix('reward-')}.timeout_s"

    @property
    def delay_s(self) -> float:
        return float(min(LONGEST_DELAY_S, FIRST_DELAY_S * 2 ** (self.short_lives - 1)))


@dataclass(frozen=True)
class Death:
    cause: str  # for people
    blameless: bool = False  # the work's, for it was the worker's device or memory


@dataclass
class Fleet:
    """All workers of a run besides the buffer, which Ray restarts by itself."""

    buffer: RemoteBuffer
    places: list[Place] = field(default_factory=list)
    restarts: dict[str, int] = field(default_factory=dict)  # by place
    notes: list[str] = field(default_factory=list)  # who died of what, and who finds no room, a sentence each
    without_room: set[str] = field(default_factory=set)  # workers that were mentioned for it
    removed: dict[str, int] = field(default_factory=dict)  # last incarnation of each; a place that comes back counts on

    def add(self, place: Place, actors: list[ActorHandle[Any]] | None = None) -> None:
        """Fills a new place, with `actors` if they were started before (rewards are, to be tried)."""
        place.incarnation = self.removed.pop(place.name, -1) + 1
        self.places.append(place)
        self.restarts.setdefault(place.name, 0)
        self._start(place, actors)

    def remove(self, place: Place) -> None:
        """Ends a place and its worker; what it was working on goes back, for others to do."""
        self.places.remove(place)
        self.removed[place.name] = place.incarnation
        if place.actors:
            self._kill(place)
            self.buffer.worker_died(place.worker, "nobody")

    def tend(self, overdue: Collection[str], heard: Mapping[str, Mapping[str, float]]) -> None:
        """Kills who is overdue, tells the buffer who died, and starts others in their places when it is time.

        heard: of the workers that ever asked for work, what they spent their seconds on. Whether work is to blame for
        a death is the buffer's decision (rule 7 of docs/buffer.md). Raises UserError when all places of a role die
        again and again before they ask for work, or before they have done any.
        """
        for place in self.places:
            if any(occupation in heard.get(place.worker, ()) for occupation in DELIVERIES):
                place.fruitless = 0
            if place.worker in overdue and not place.late:
                place.late = True
                self._kill(place)
            if place.actors and (death := self._death(place)):
                self._bury(place, death, place.worker in heard)
            elif place.created is not None and place.actors:
                self._look_for_room(place)
            if not place.actors and time.monotonic() >= place.restart_at:
                self.restarts[place.name] += 1
                place.incarnation += 1
                self._start(place)

    def end(self) -> None:
        for place in self.places:
            self._kill(place)
            place.actors = []

    def _start(self, place: Place, actors: list[ActorHandle[Any]] | None = None) -> None:
        place.actors = actors or place.start(place.worker)
        place.nodes = [node_of(actor) for actor in place.actors]
        place.created = place.nodes[-1]
        place.silent_since, place.late = None, False
        place.running = [actor.run.remote(self.buffer.actor) for actor in place.actors]
        place.started_at = time.monotonic()

    def _look_for_room(self, place: Place) -> None:
        """Notes, once, that a worker waits long to be created. Its life is counted from its creation."""
        if ray.wait([place.created], timeout=0)[0]:
            place.started_at = time.monotonic()
            place.created = None
        elif time.monotonic() - place.started_at > ROOM_S and place.worker not in self.without_room:
            self.without_room.add(place.worker)
            self.notes.append(
                f"{place.worker} has not started for {ROOM_S:.0f} s: the cluster has no room for it, or is busy; the "
                "run goes on with those that did"
            )

    def _kill(self, place: Place) -> None:
        for actor in place.actors:
            ray.kill(actor, no_restart=True)

    def _death(self, place: Place) -> "Death | None":
        """Why an actor's `run` ended; None while all work. Raises a worker's UserError and RunStopped, which no restart
        mends.

        If several ended, a death explains more than an exception: a rank may have raised because another died. A broken
        connection is neither: a moment later the cluster knows what it was.
        """
        done, _ = ray.wait(place.running, num_returns=len(place.running), timeout=0)
        causes: list[Death] = []
        for reference in done:
            try:
                ray.get(reference)
                causes.append(Death("it ended by itself"))
            except RayTaskError as error:  # an exception in the worker's own loop
                if isinstance(error.cause, RunStopped | UserError):
                    raise error.cause from None
                failed = isinstance(error.cause, WorkerFailed)
                sentence = error.cause.sentence if failed else describe(error.cause or error)
                causes.append(Death(sentence, blameless=failed and error.cause.blameless))
            except ActorUnavailableError:
                rank = place.running.index(reference)
                place.running[rank] = place.actors[rank].__ray_ready__.remote()
                place.silent_since = place.silent_since or time.monotonic()
            except RayError as error:  # of an actor, or one that Ray has for a kind of death, such as OutOfMemoryError
                place.silent_since = None
                causes.insert(0, Death(why_it_died(error), blameless=isinstance(error, OutOfMemoryError)))
        if place.silent_since and time.monotonic() - place.silent_since > SILENCE_S:
            causes.append(Death(f"it has not answered for {SILENCE_S:.0f} s", blameless=True))
        return causes[0] if causes else None

    def _lost_hosts(self, place: Place) -> bool:
        """Whether a host that its actors were on has left the cluster. For an actor that never ran, none is known."""
        known, _ = ray.wait(place.nodes, num_returns=len(place.nodes), timeout=0)
        for node in known:
            with contextlib.suppress(RayError):
                if not node_lives(ray.get(node)):
                    return True
        return False

    def _bury(self, place: Place, death: "Death", started: bool) -> None:
        self._kill(place)
        lost = death.cause == NODE_DIED or self._lost_hosts(place)
        cause = f"it took longer than {place.time_limit} allows" if place.late else death.cause
        cause = "with its host" if lost else cause
        self.buffer.worker_died(place.worker, "nobody" if lost else "device" if death.blameless else "work")
        healthy = time.monotonic() - place.started_at >= HEALTHY_S
        place.short_lives = 1 if healthy else place.short_lives + 1
        place.failed_starts = 0 if started or lost else place.failed_starts + 1
        place.fruitless += death.blameless and not lost
        others = [other for other in self.places if other.role == place.role]
        alike = ", and so did all others of its kind" if len(others) > 1 else ""
        self.notes.append(f"{place.worker} died ({cause}); another takes its place in {place.delay_s:.0f} s")
        if all(other.fruitless >= MOST_FRUITLESS for other in others):
            raise UserError(
                f"{place.name} failed {place.fruitless} times in a row before it had made anything{alike}; the last "
                f"cause: {cause}; mend that and start again, nothing is lost"
            )
        if all(other.failed_starts >= MOST_FAILED_STARTS for other in others):
            raise UserError(
                f"{place.name} died {place.failed_starts} times in a row before it could ask for work{alike}; the last "
                f"cause: {cause}"
            )
        place.actors = []
        place.restart_at = time.monotonic() + place.delay_s


def why_it_died(error: RayError) -> str:
    """The cause of a death, from Ray's message, such as "The actor died because its node has died". The message has a
    general line, lines that begin with a tab, then the cause, and sometimes that the actor never ran. An error class of
    its own for one kind of death names it in the first line, before some advice."""
    if not isinstance(error, RayActorError):
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    lines = [line for line in str(error).strip().splitlines() if line and not line.startswith(("\t", NEVER_RAN))]
    return lines[-1].split(". ")[0].rstrip(".")
