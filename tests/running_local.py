"""Real runs of workers/local.py for tests: what `launch.py` does, without Ray, in the seconds that the work takes."""

import contextlib
import functools
import importlib
import io
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import launch
from tests.running import TIMEOUT_S
from workers import local


def run_local(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The same run without Ray, by workers/local.py in this process: for what has nothing to do with actors."""
    return _in_this_process(local.main, arguments, cwd)


def launch_here(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """`launch.py` in this process: for what it answers before it starts Ray."""
    return _in_this_process(launch.main, arguments, cwd)


def _in_this_process(
    main: Callable[[list[str]], int], arguments: tuple[str, ...], cwd: Path
) -> subprocess.CompletedProcess[str]:
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors), as_in_a_process_of_its_own(cwd):
        code = main([*arguments])
    return subprocess.CompletedProcess(arguments, code, output.getvalue(), errors.getvalue())


@contextmanager
def as_in_a_process_of_its_own(cwd: Path) -> Iterator[None]:
    """Started in `cwd`: what lies there is imported anew, and what a run sets for its process is set back."""
    threads, path = torch.get_num_threads(), [*sys.path]
    try:
        with contextlib.chdir(cwd):
            yield
    finally:
        torch.set_num_threads(threads)
        sys.path[:] = path
        for name, module in [*sys.modules.items()]:
            if Path(getattr(module, "__file__", None) or "/").parent == cwd:
                del sys.modules[name]


def kill_local(*arguments: str, cwd: Path, at: str) -> None:
    """Such a run in a process of its own, which SIGKILL ends as it makes a call: "module:function:n" is the n-th call
    of what that module knows by this name (Class.method for a method)."""
    context = multiprocessing.get_context("forkserver")  # which imports torch once, for all of them
    context.set_forkserver_preload([__name__])
    process = context.Process(target=_run_until, args=(at, arguments, cwd))
    process.start()
    process.join(TIMEOUT_S)
    assert process.exitcode == -signal.SIGKILL, f"it was not killed at {at}: it ended with {process.exitcode}"


def _run_until(at: str, arguments: tuple[str, ...], cwd: Path) -> None:
    module, path, number = at.split(":")
    *classes, name = path.split(".")
    owner = functools.reduce(getattr, classes, importlib.import_module(module))
    function, calls = getattr(owner, name), itertools.count(1)

    def fatal(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == int(number):
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    setattr(owner, name, fatal)
    os.chdir(cwd)
    local.main([*arguments])
