"""Lets a test stop a real run at an exact moment, or give its parts known durations: Python reads this file at start
where it is on PYTHONPATH.

    FAULT=module:function:n     the n-th call of that function, in whichever actor makes it, writes the file named by
                                FAULT_MARK and then waits, so that the test can kill what it wants to kill, or do
                                what it wants to do meanwhile: with FAULT_MARK.released it goes on. Only the first to
                                get there stops: whoever takes its place goes on.
    FAULT=@file                 the same from a file, for actors of a cluster that outlives the test's run
    DELAYS=module:function:s,...    every call of these functions first waits s seconds
    DELAYS=module:function:s:n,...  only the n-th does, in each process
    SICK=module:function:worker     every call of that function raises what a lost device raises, in workers whose name
                                    begins so
    STILLBORN=text                  a Python with this text on its command line does not start, and says why
    (Class.method for a method)

The project's code knows nothing of it.
"""

import contextlib
import functools
import importlib.abc
import importlib.machinery
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType


def stop_at(call: int) -> Callable[[], None]:
    """Its `call`-th call, counted from 1, waits to be released."""
    calls = 0

    def before() -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            mark = Path(os.environ["FAULT_MARK"])
            partial = mark.with_name(f"{mark.name}.{os.getpid()}")
            partial.write_text(str(os.getpid()))
            with contextlib.suppress(FileExistsError):
                mark.hardlink_to(partial)
                while not mark.with_name(f"{mark.name}.released").exists():
                    time.sleep(0.05)

    return before


def delay(seconds: float, call: int | None) -> Callable[[], None]:
    """Waits at each call, or at its `call`-th alone."""
    calls = 0

    def before() -> None:
        nonlocal calls
        calls += 1
        if call in (None, calls):
            time.sleep(seconds)

    return before


def lose_device(worker: str) -> None:
    import ray
    import torch

    if (ray.get_runtime_context().get_actor_name() or "").startswith(worker):
        raise torch.AcceleratorError("CUDA error: device-side assert triggered")


def wrap(module: ModuleType, path: str, before: Callable[[], None]) -> None:
    """From now on `module.path` calls `before` first."""
    owner: object = module
    *classes, name = path.split(".")
    for part in classes:
        owner = getattr(owner, part)
    function = getattr(owner, name)

    @functools.wraps(function)
    def wrapped(*args: object, **kwargs: object) -> object:
        before()
        return function(*args, **kwargs)

    setattr(owner, name, wrapped)


class FaultFinder(importlib.abc.MetaPathFinder):
    """Finds the one module as usual, and wraps the function as soon as the module is loaded."""

    def __init__(self, module: str, path: str, before: Callable[[], None]) -> None:
        self.module, self.path, self.before = module, path, before

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != self.module:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        assert spec is not None and spec.loader is not None
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            wrap(module, self.path, self.before)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


fault = os.environ.get("FAULT", "")
if fault.startswith("@"):
    fault = Path(fault[1:]).read_text() if Path(fault[1:]).exists() else ""
if fault:
    fault_module, fault_path, fault_call = fault.split(":")
    sys.meta_path.insert(0, FaultFinder(fault_module, fault_path, stop_at(int(fault_call))))
for slow in filter(None, os.environ.get("DELAYS", "").split(",")):
    slow_module, slow_path, seconds, *nth = slow.split(":")
    sys.meta_path.insert(0, FaultFinder(slow_module, slow_path, delay(float(seconds), int(nth[0]) if nth else None)))
if sick := os.environ.get("SICK"):
    sick_module, sick_path, sick_worker = sick.split(":")
    sys.meta_path.insert(0, FaultFinder(sick_module, sick_path, functools.partial(lose_device, sick_worker)))
if (stillborn := os.environ.get("STILLBORN")) and stillborn in Path("/proc/self/cmdline").read_text():
    sys.stderr.write("ImportError: libcudart.so.99: cannot open shared object file\n")
    sys.stderr.flush()
    os._exit(1)
