"""The order of the suite, and what holds for all of it."""

import pytest
from hypothesis import HealthCheck, settings

from tests import running

# How long an example takes says something of the machine, and nothing of the code.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

RUNS = (running.launch, running.launched)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with real runs in them first: with one of these last, the other of the two workers would end idle."""
    items.sort(key=lambda item: not makes_runs(item))


def makes_runs(item: pytest.Item) -> bool:
    names = vars(item.module).values() if isinstance(item, pytest.Function) else ()
    return any(value is run for value in names for run in RUNS)
