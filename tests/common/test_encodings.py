"""Text files are UTF-8 whatever the locale, and printing never fails."""

import ast
from pathlib import Path

import pytest

from tests.running import ROOT

SOURCES = sorted(
    path.relative_to(ROOT)
    for path in ROOT.rglob("*.py")
    if not path.relative_to(ROOT).parts[0].startswith(".") and path.relative_to(ROOT).parts[0] != "tests"
)
READS_OR_WRITES_TEXT = {"read_text": 0, "write_text": 1}  # and how many arguments come before the encoding


def names_no_encoding(call: ast.Call) -> bool:
    """Whether this call opens a file as text in the encoding of the locale."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    keywords = {keyword.arg: keyword.value for keyword in call.keywords}
    if "encoding" in keywords:
        return False
    if name in READS_OR_WRITES_TEXT:
        return len(call.args) <= READS_OR_WRITES_TEXT[name]
    if name in ("run", "Popen", "check_output"):
        return bool({"text", "universal_newlines"} & keywords.keys())
    of_a_path = isinstance(call.func, ast.Attribute)
    if name != "open" or (
        of_a_path and isinstance(call.func, ast.Attribute) and ast.unparse(call.func.value) in ("os", "Image")
    ):
        return False
    mode = keywords.get("mode") or next(iter(call.args[0 if of_a_path else 1 :]), None)
    return not (isinstance(mode, ast.Constant) and isinstance(mode.value, str) and "b" in mode.value)


@pytest.mark.parametrize("source", SOURCES, ids=str)
def test_every_text_file_is_opened_with_an_encoding(source: Path) -> None:
    calls = [node for node in ast.walk(ast.parse((ROOT / source).read_bytes())) if isinstance(node, ast.Call)]
    assert not [f"{source}:{call.lineno}" for call in calls if names_no_encoding(call)]


def is_a_program(source: Path) -> bool:
    text = (ROOT / source).read_text(encoding="utf-8")
    return "__main__" in text and "print(" in text


@pytest.mark.parametrize("source", [source for source in SOURCES if is_a_program(source)], ids=str)
def test_every_program_can_print_in_every_encoding(source: Path) -> None:
    text = (ROOT / source).read_text(encoding="utf-8")
    assert any(by in text for by in ("print_anywhere()", "@command(", "return study("))  # the others call it


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("path.read_text()", True),
        ("path.read_text(encoding='utf-8')", False),
        ("path.write_text(text)", True),
        ("path.open()", True),
        ("path.open('a')", True),
        ("path.open('rb')", False),
        ("open(path)", True),
        ("open(path, 'w')", True),
        ("open(path, mode='wb')", False),
        ("os.open(path, flags)", False),
        ("subprocess.run(command, text=True)", True),
    ],
)
def test_the_search_finds_what_it_is_for(text: str, found: bool) -> None:
    (call,) = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
    assert names_no_encoding(call) is found
