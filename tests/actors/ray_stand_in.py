"""A stand-in of Ray, for tests of the fleet and the driver: what they ask of Ray, over actors that end as a test says.

Only the buffer's actor is a real one, whose calls are answered at once. Workers do nothing.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from actors.buffer_actor import BufferActor

RUNNING = object()
HERE, THERE = "5f" * 28, "a0" * 28  # hosts, as Ray names them


@dataclass(eq=False)
class Call:
    """What a method's `remote` gives: the answer or exception, once there is one."""

    answer: Any = RUNNING


class Actor:
    """One that has started on a host and works on."""

    def __init__(self, *arguments: Any, host: Call | None = None) -> None:
        self.arguments = arguments
        self.work = Call()
        self.killed = False
        self.answers = {
            "run": self.work,
            "__ray_ready__": Call(),
            "__ray_call__": host or Call(HERE),
            "prepare": Call(None),
            "meet": Call(("127.0.0.1", 1)),
        }

    def __getattr__(self, method: str) -> Any:
        if method not in self.answers:
            raise AttributeError(method)
        return SimpleNamespace(remote=lambda *_: self.answers[method])


class Buffer:
    """The buffer's actor. `silent`: its calls get no answer; `failing`: they get this exception."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.loop = asyncio.new_event_loop()
        self.silent, self.killed = False, False
        self.failing: Exception | None = None
        self.real = BufferActor(*arguments)

    def restart(self) -> None:
        """As Ray does when its process died: a new one over the same folder."""
        self.real.buffer.close()
        self.real = BufferActor(*self.arguments)

    def __getattr__(self, method: str) -> Any:
        def remote(*arguments: Any, **named: Any) -> Call:
            if self.silent:
                return Call()
            if self.failing is not None:
                return Call(self.failing)
            return Call(self.loop.run_until_complete(getattr(self.real, method)(*arguments, **named)))

        return SimpleNamespace(remote=remote)


@dataclass
class Ray:
    hosts: set[str] = field(default_factory=lambda: {HERE, THERE})
    made: dict[str, Any] = field(default_factory=dict)  # actors by name
    before: Callable[[str, Actor], None] = lambda name, actor: None  # what a test does to an actor that was made

    def remote(self, **_: Any) -> Any:
        def of(kind: type) -> Any:
            def options(name: str, **_: Any) -> Any:
                return SimpleNamespace(remote=lambda *arguments: self._make(kind, name, arguments))

            return SimpleNamespace(options=options)

        return of

    def _make(self, kind: type, name: str, arguments: tuple[Any, ...]) -> Any:
        actor: Any = (Buffer if kind is BufferActor else Actor)(*arguments)
        self.before(name, actor)
        self.made[name] = actor
        return actor

    def wait(self, calls: list[Call], num_returns: int = 1, timeout: float = 0.0) -> tuple[list[Call], list[Call]]:
        done = [call for call in calls if call.answer is not RUNNING]
        return done, [call for call in calls if call.answer is RUNNING]

    def get(self, call: Call, timeout: float | None = None) -> Any:
        assert call.answer is not RUNNING, "it would wait for ever"
        if isinstance(call.answer, Exception):
            raise call.answer
        return call.answer

    def put(self, value: Any) -> Any:
        return value

    def kill(self, actor: Any, no_restart: bool) -> None:
        assert no_restart
        actor.killed = True

    def nodes(self) -> list[dict[str, Any]]:
        return [{"NodeID": host, "Alive": True} for host in self.hosts]

    def get_runtime_context(self) -> Any:
        return SimpleNamespace(get_node_id=lambda: HERE)


@dataclass
class Clock:
    now: float = 1000.0

    def monotonic(self) -> float:
        return self.now

    time = monotonic


class Metric:
    def __init__(self, *_: Any) -> None: ...
    def set(self, *_: Any, **__: Any) -> None: ...
    def inc(self, *_: Any, **__: Any) -> None: ...


def stand_in(monkeypatch: pytest.MonkeyPatch) -> tuple[Ray, Clock]:
    """Ray, and the clock by which the driver and the fleet go, for one test."""
    ray, clock = Ray(), Clock()
    for module in ("driver", "fleet", "placement", "remote_buffer"):
        monkeypatch.setattr(f"actors.{module}.ray", ray)
    for module in ("driver", "fleet"):
        monkeypatch.setattr(f"actors.{module}.time", clock)
    monkeypatch.setattr("actors.driver.POLL_S", 0.0)  # the buffer has its news at once
    for metric in ("Counter", "Gauge"):
        monkeypatch.setattr(f"actors.gauges.{metric}", Metric)
    return ray, clock
