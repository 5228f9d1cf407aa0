"""The fleet: which actors there are, who died, and when to start the next in its place."""

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayTaskError

from buffer.errors import RunStopped
from conf.errors import UserError

FIRST_DELAY_S = 1.0
LONGEST_DELAY_S = 60.0
HEALTHY_S = 60.0  # a worker that lived so long starts its place's delay anew
MOST_FAILED_STARTS = 5  # in a row, of one place, without once asking for work: no restart mends that


@dataclass
class Place:
    """A worker's place in the fleet: the role and index stay, the actor in it changes."""

    name: str  # role and index, such as sampler-0
    start: Callable[[str], ActorHandle]  # makes the actor of that name
    actor: ActorHandle | None = None
    running: ray.ObjectRef | None = None  # of the actor's `run`, which ends only by a death
    incarnation: int = 0
    started_at: float = 0.0
    restart_at: float = 0.0
    short_lives: int = 0  # in a row
    failed_starts: int = 0  # in a row

    @property
    def worker(self) -> str:
        """The actor's own name, never used twice: what the buffer hears of a dead one must not touch the next."""
        return f"{self.name}.{self.incarnation}"

    @property
    def delay_s(self) -> float:
        return float(min(LONGEST_DELAY_S, FIRST_DELAY_S * 2 ** (self.short_lives - 1)))


@dataclass
class Fleet:
    """All workers of a run besides the buffer, which Ray restarts by itself."""

    buffer: ActorHandle
    places: list[Place] = field(default_factory=list)
    restarts: dict[str, int] = field(default_factory=dict)  # by place
    deaths: list[str] = field(default_factory=list)  # who died of what, a sentence each

    def add(self, place: Place, actor: ActorHandle | None = None) -> None:
        """Fills a new place, with `actor` if it was started before (rewards are, to be tried)."""
        self.places.append(place)
        self.restarts[place.name] = 0
        self._start(place, actor)

    def tend(self, overdue: Collection[str], heard: Collection[str]) -> None:
        """Kills who is overdue, tells the buffer who died, and starts others in their places when it is time.

        heard: the workers that ever asked for work. Who dies of his work is the buffer's to judge (PROTOCOL.md 7);
        raises UserError when one place dies again and again before it asks for any.
        """
        for place in self.places:
            if place.actor is not None and place.worker in overdue:
                ray.kill(place.actor, no_restart=True)
            if place.actor is not None and (cause := self._death(place)):
                self._bury(place, place.actor, cause, place.worker in heard)
            if place.actor is None and time.monotonic() >= place.restart_at:
                self.restarts[place.name] += 1
                place.incarnation += 1
                self._start(place)

    def end(self) -> None:
        for place in self.places:
            if place.actor is not None:
                ray.kill(place.actor, no_restart=True)
                place.actor = None

    def _start(self, place: Place, actor: ActorHandle | None = None) -> None:
        place.actor = actor or place.start(place.worker)
        place.running = place.actor.run.remote(self.buffer)
        place.started_at = time.monotonic()

    def _death(self, place: Place) -> str | None:
        """Why the actor's `run` ended, or None while it works. What no restart mends is raised here as it was there."""
        done, _ = ray.wait([place.running], timeout=0)
        if not done:
            return None
        try:
            ray.get(done[0])
        except RayTaskError as error:  # an exception in the worker's own loop
            if isinstance(error.cause, RunStopped | UserError):
                raise error.cause from None
            return f"{type(error.cause).__name__}: {error.cause}"
        except RayActorError as error:
            return str(error).strip().splitlines()[0]
        return "it ended by itself"

    def _bury(self, place: Place, actor: ActorHandle, cause: str, started: bool) -> None:
        ray.kill(actor, no_restart=True)
        ray.get(self.buffer.worker_died.remote(place.worker))
        healthy = time.monotonic() - place.started_at >= HEALTHY_S
        place.short_lives = 1 if healthy else place.short_lives + 1
        place.failed_starts = 0 if started else place.failed_starts + 1
        self.deaths.append(f"{place.worker} died ({cause}); another takes its place in {place.delay_s:.0f} s")
        if place.failed_starts >= MOST_FAILED_STARTS:
            raise UserError(
                f"{place.name} died {place.failed_starts} times in a row before it could ask for work; the last cause: "
                f"{cause}"
            )
        place.actor = None
        place.restart_at = time.monotonic() + place.delay_s
