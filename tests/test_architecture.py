"""The house: imports go down, Ray is in few rooms, and nothing is long. docs/architecture.md draws it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.running import ROOT

# From the ground up: a room imports from those before it. "launch" is launch.py.
ROOMS = (
    "common prompts conf policy rewards buffer learner mirror evaluation report monitoring workers actors launch "
    "emoji_world studies benchmarks"
).split()
RAY = {"actors", "launch", "benchmarks"}
LONGEST_FILE, LONGEST_FUNCTION = 350, 60  # lines
FILES = sorted([*(file for room in ROOMS for file in ROOT.glob(f"{room}/**/*.py")), ROOT / "launch.py"])


def room_of(file: Path) -> str:
    """A package's command stands above all rooms, as launch.py does."""
    return "launch" if file.name == "__main__.py" else file.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(tree: ast.AST) -> Iterator[str]:
    """The first name of every import, wherever it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, "imports name their room"
            yield node.module.split(".")[0]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_go_down(file: Path) -> None:
    room, names = room_of(file), set(imported(ast.parse(file.read_text(encoding="utf-8"))))
    above = ROOMS[ROOMS.index(room) + 1 :]
    assert not names & {*above}
    assert "tests" not in names or room == "benchmarks"  # which starts runs as tests do
    assert "ray" not in names or room in RAY


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_nothing_is_long(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LONGEST_FILE
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < LONGEST_FUNCTION, node.name


def test_every_package_is_a_room() -> None:
    """What is in no room would be held to nothing."""
    packages = {folder.parent.name for folder in ROOT.glob("*/__init__.py")}
    assert packages == {*ROOMS, "tests"} - {"launch"}
