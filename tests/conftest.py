"""The order of the suite, and what holds for all of it."""

import inspect
import os
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FunctionType, ModuleType

import pytest
from hypothesis import HealthCheck, settings

from tests import running

# Two test processes share two cores: with two threads each, they would wait for each other at every operation of torch.
# What they start inherits it. It is read when torch is imported, which no line above does.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# How long an example takes says something of the machine, and nothing of the code.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline as small as can be, for real runs that are not about their model."""
    from tests.pipelines import tiny_pipeline

    return tiny_pipeline(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def undisturbed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of four batches, without Ray, that nothing happened to."""
    from tests.running_local import run_local

    work = tmp_path_factory.mktemp("undisturbed")
    done = run_local(*running.small(model, "run", "run.batches=4"), cwd=work)
    assert done.returncode == 0, done.stderr
    return work / "runs" / "run"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks tests that start Ray, and those that make a whole run with or without it; `make quick` has neither.

    Those come first, as with one of them last the other of two workers would end idle.
    """
    for item in items:
        if isinstance(item, pytest.Function):
            for mark in set().union(*(marks(function, set()) for function in functions_of(item))):
                item.add_marker(mark)
    items.sort(key=lambda item: (not item.get_closest_marker("ray"), not item.get_closest_marker("runs")))


STARTS = {
    "tests.running.launched": {"ray", "runs"},
    "ray._private.worker.init": {"ray"},
    "tests.running_local.run_local": {"runs"},
    "tests.running_local.kill_local": {"runs"},
    "workers.local.run": {"runs"},
    "benchmarks.staleness.run": {"runs"},
}


def functions_of(item: pytest.Function) -> list[FunctionType]:
    """The test, its fixtures, and functions that it has as parameters."""
    fixtures = [fixture.func for found in item._fixtureinfo.name2fixturedefs.values() for fixture in found]
    parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
    found = [inspect.unwrap(function) for function in (item.function, *fixtures, *parameters) if callable(function)]
    return [function for function in found if isinstance(function, FunctionType)]


def marks(function: FunctionType, seen: set[FunctionType]) -> set[str]:
    """What a function starts, itself or by the tests' and benchmarks' own functions that it calls."""
    if function in seen:
        return set()
    seen.add(function)
    found: set[str] = set()
    for called in called_by(function):
        found |= STARTS.get(f"{called.__module__}.{called.__qualname__}", set())
        if called.__module__.split(".")[0] in ("tests", "benchmarks"):
            found |= marks(inspect.unwrap(called), seen)
    return found


def called_by(function: FunctionType) -> Iterator[FunctionType]:
    """Functions that it names, in its module or as those of a module."""
    names = names_in(function.__code__)
    for name in names:
        value = function.__globals__.get(name)
        attributes = [vars(value).get(attribute) for attribute in names] if isinstance(value, ModuleType) else []
        yield from (one for one in (value, *attributes) if isinstance(one, FunctionType))


def names_in(code: CodeType) -> set[str]:
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return {*code.co_names}.union(*map(names_in, inner))
