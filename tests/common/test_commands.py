"""What every command shares."""

import subprocess
import sys
from argparse import ArgumentTypeError
from collections.abc import Sequence
from pathlib import Path

import pytest

from common.commands import at_least_1, command, path_of
from common.errors import RunStopped, UserError
from tests.running import ROOT


@pytest.mark.parametrize(
    ("raised", "code", "says"),
    [
        (None, 0, ""),
        (UserError("one\ntwo"), 2, "mine: one two\n"),
        (RunStopped("stopped"), 2, "mine: stopped\n"),
        (KeyboardInterrupt(), 130, "mine: goes on\n"),
    ],
)
def test_a_command_ends_with_a_code_and_a_sentence(
    raised: BaseException | None, code: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    @command("mine", interrupted="goes on")
    def main(arguments: Sequence[str]) -> None:
        if raised:
            raise raised

    assert main([]) == code and capsys.readouterr().err == says


@pytest.mark.parametrize("program", ["launch.py", "-m workers.local"])
def test_who_reads_the_first_lines_alone_breaks_nothing(program: str) -> None:
    shell = f"{sys.executable} {program} --help | head -1"
    done = subprocess.run(shell, shell=True, cwd=ROOT, capture_output=True, encoding="utf-8", check=True)
    assert done.stdout.strip() and done.stderr == ""


def test_arguments() -> None:
    assert path_of("~/a") == Path.home() / "a" and path_of("~no-such-user/a") == Path("~no-such-user/a")
    assert at_least_1("3") == 3
    for text in ("0", "-1", "many", "1.5"):
        with pytest.raises(ArgumentTypeError, match="no whole number of at least 1"):
            at_least_1(text)
