"""The version: one constant, printed, recorded by a run, shown in its report, and looked at before a run goes on."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import common.version
from buffer.run_folder import RunFolder
from common.errors import UserError
from common.version import VERSION, written_by
from conf.load import from_file, load
from conf.resume import check_resume, check_same, save_config
from report import sections
from report.record import record_sitting
from tests.running import ROOT

NUMBERS = VERSION.split(".")


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Of a run that has version 0 of its weights."""
    folder = tmp_path / "compressibility"
    save_config(folder, load(["compressibility"]), ["a cat"])
    (folder / "checkpoints" / "v00000.e0001.00001").mkdir(parents=True)
    return folder


def replace_heading(run_dir: Path, heading: str) -> None:
    text = (run_dir / "config.yaml").read_text().partition("\n")[2]
    (run_dir / "config.yaml").write_text(heading + text)


def test_it_is_printed_before_anything_is_imported_that_takes_time() -> None:
    command = "import sys, launch; launch.main(['--version']); print({'yaml', 'omegaconf'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True, encoding="utf-8", check=True)
    assert done.stdout == f"ddpo-ray {VERSION}\nset()\n"


def test_the_project_and_the_changelog_have_it() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "common.version.VERSION"}
    assert re.search(f"^## {re.escape(VERSION)}$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


def test_a_run_records_it_and_the_report_shows_it(run_dir: Path) -> None:
    assert (run_dir / "config.yaml").read_text().startswith(f"# ddpo-ray {VERSION}\n")
    assert written_by(run_dir / "config.yaml") == f"version {VERSION}"
    assert from_file(run_dir / "config.yaml") == load(["compressibility"])
    record_sitting(run_dir, 1, 0.0, {})
    assert f"ddpo-ray {VERSION}, torch" in sections.machine(RunFolder(run_dir))


def test_a_run_goes_on_with_a_version_that_differs_in_the_last_number(run_dir: Path) -> None:
    config = load(["compressibility"])
    for patch in (NUMBERS[2], "77"):
        replace_heading(run_dir, f"# ddpo-ray {NUMBERS[0]}.{NUMBERS[1]}.{patch}\n")
        check_resume(run_dir, config, ["a cat"])


@pytest.mark.parametrize(
    ("heading", "says"),
    [
        ("", "a version before 0.5"),
        (f"# ddpo-ray {NUMBERS[0]}.{NUMBERS[1]}1.0\n", f"version {NUMBERS[0]}.{NUMBERS[1]}1.0"),
        ("# ddpo-ray 12.5.0\n", "version 12.5.0"),
        ("# ddpo-ray\n", "a version before 0.5"),
    ],
)
def test_a_run_of_another_version_is_refused_by_name(heading: str, says: str, run_dir: Path) -> None:
    config = load(["compressibility"])
    replace_heading(run_dir, heading)
    for check in (check_resume, check_same):  # of the run folder, and of a mirror's
        with pytest.raises(UserError, match=f"was written by {re.escape(says)}, and this is version {VERSION}"):
            check(run_dir, config, ["a cat"])
    (run_dir / "config.yaml").write_text(heading + "learner: {algorithm: ddpo_is}\n")
    for read in (from_file, lambda path: load([str(path)])):
        with pytest.raises(UserError, match=rf"config\.yaml, written by {re.escape(says)}: there is no setting"):
            read(run_dir / "config.yaml")


def test_nothing_was_made_before_the_first_weights_so_any_version_goes_on(run_dir: Path) -> None:
    (run_dir / "checkpoints" / "v00000.e0001.00001").rmdir()
    replace_heading(run_dir, "")
    check_resume(run_dir, load(["compressibility"]), ["a cat"])


def test_an_experiment_of_the_user_has_no_version(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("learner: {algorithm: ddpo_is}\n")
    with pytest.raises(UserError, match=r"config\.yaml: there is no setting"):
        load([str(tmp_path / "config.yaml")])


def test_the_version_is_three_numbers() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", common.version.VERSION)
