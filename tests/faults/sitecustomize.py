"""Lets a test stop a real run at an exact moment: Python reads this file at start where it is on PYTHONPATH.

    FAULT=module:function:n     the n-th call of that function, in whichever actor makes it, writes the file named by
                                FAULT_MARK and then waits for ever, so that the test can kill what it wants to kill
    (Class.method for a method)

The project's code knows nothing of it.
"""

import functools
import importlib.abc
import importlib.machinery
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType


def stop_at(module: ModuleType, path: str, call: int) -> None:
    """Wraps `module.path` so that its `call`-th call, counted from 1, never returns."""
    owner: object = module
    *classes, name = path.split(".")
    for part in classes:
        owner = getattr(owner, part)
    function = getattr(owner, name)
    calls = 0

    @functools.wraps(function)
    def wrapped(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        if calls == call:
            Path(os.environ["FAULT_MARK"]).write_text(str(os.getpid()))
            while True:
                signal.pause()
        return function(*args, **kwargs)

    setattr(owner, name, wrapped)


class FaultFinder(importlib.abc.MetaPathFinder):
    """Finds the one module as usual, and wraps the function as soon as the module is loaded."""

    def __init__(self, module: str, path: str, call: int) -> None:
        self.module, self.path, self.call = module, path, call

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
            stop_at(module, self.path, self.call)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if fault := os.environ.get("FAULT"):
    fault_module, fault_path, fault_call = fault.split(":")
    sys.meta_path.insert(0, FaultFinder(fault_module, fault_path, int(fault_call)))
