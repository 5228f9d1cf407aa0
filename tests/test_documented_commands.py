"""Every command that the README and the pages give is one that works: settings, experiments, modules, targets."""

import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest

from conf.load import from_file, load
from conf.resume import save_config
from conf.schema import ModelConfig
from conf.validate import validate
from tests.running import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# A command ends with its code span, its comment, or what its output goes to.
LAUNCH = re.compile(r"launch\.py +([^`\n#|>]+)")
IN_CODE = re.compile(r"^    .*$|`[^`\n]+`", re.MULTILINE)


def code(page: Path) -> str:
    """The page's blocks and spans of code, one a line; a command that goes on in the next line is one."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    return "\n".join(line.partition(" #")[0] for line in IN_CODE.findall(text))


def launches() -> list[tuple[str, list[str]]]:
    """(page, words) of each `launch.py` with an experiment."""
    found = []
    for page in PAGES:
        for match in LAUNCH.finditer(code(page)):
            words = [word for word in shlex.split(match[1]) if word not in ("[KEY=VALUE", "...]")]
            if words and not words[0].startswith(("--", "runs/", "mine.yaml")):
                found.append((page.name, ["compressibility" if words[0] == "EXPERIMENT" else words[0], *words[1:]]))
    return found


OF_EXPERIMENTS = [(page, words) for page, words in launches() if words[0] != "replay"]


def test_there_are_commands_to_look_at() -> None:
    pages = {page for page, _ in launches()}
    assert {"README.md", "policy.md", "cluster.md", "results.md", "running.md"} <= pages


@pytest.mark.parametrize(("page", "words"), launches(), ids=lambda value: value if isinstance(value, str) else None)
def test_a_command_of_the_docs_is_accepted(
    page: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    if words[0] == "replay":  # of runs that the lines before it have made
        monkeypatch.chdir(tmp_path)
        for run in words[1].removeprefix("from=").split(","):
            save_config(tmp_path / run, load(["compressibility"]), ["a cat"])
    validate(load(words))


@pytest.mark.parametrize(("page", "words"), OF_EXPERIMENTS, ids=lambda value: value if isinstance(value, str) else None)
def test_a_command_of_the_docs_trains_the_model_that_its_experiment_is_made_for(page: str, words: list[str]) -> None:
    """Another model needs other settings than the shipped one's few steps, large learning rate and small batches."""
    file = ROOT / "conf" / "experiment" / f"{words[0]}.yaml"
    made_for = from_file(file).model.path if file.exists() else ModelConfig().path
    assert load(words).model.path == made_for, f"{page}: launch.py {' '.join(words)}"


def test_every_module_that_the_docs_start_is_there() -> None:
    modules = {name for page in PAGES for name in re.findall(r"python -m ([\w.]+)", code(page))}
    assert {"monitoring.board"} <= modules
    assert not [name for name in modules if find_spec(name) is None]


def test_every_target_that_the_docs_make_is_there() -> None:
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {name for page in PAGES for name in re.findall(r"\bmake ([a-z][\w-]*)", code(page))}
    assert {"train", "test", "test-slow"} <= named
    assert named <= targets


def test_every_experiment_of_another_model_that_the_docs_name_is_there() -> None:
    experiments = {path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml")}
    named = {name for page in PAGES for name in re.findall(r"\bsd15_[a-z_]+\b", page.read_text(encoding="utf-8"))}
    assert named and named <= experiments
