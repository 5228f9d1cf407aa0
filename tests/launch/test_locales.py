"""Real runs under locales that are not UTF-8: they print what they can, and every file is in UTF-8 all the same."""

import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from common.terminal import PLAIN
from tests.running import EXPERIMENT, ROOT, SMALL, TIMEOUT_S, launch

PROMPTS = ["zwei Füchse ± eine 猫", "👨‍👩‍👧 on the beach", "“two” dogs → café"]
# Python makes UTF-8 of the C locale unless it is told not to.
STRICT = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def latin_1(folder: Path) -> dict[str, str]:
    """A German locale in ISO-8859-1, made in `folder`; where the system has no sources of locales, that of Python's
    own streams alone."""
    made = ["localedef", "-i", "de_DE", "-f", "ISO-8859-1", str(folder / "de_DE.ISO-8859-1")]
    try:
        subprocess.run(made, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return {"LC_ALL": "C", "PYTHONIOENCODING": "iso-8859-1", **STRICT}
    return {"LOCPATH": str(folder), "LC_ALL": "de_DE.ISO-8859-1"}


@pytest.mark.parametrize("locale", ["C", "ISO-8859-1", "ascii streams"])
def test_a_run_prints_and_writes_in_every_locale_and_goes_on_so(
    locale: str, model: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {
        "C": {"LC_ALL": "C", **STRICT},
        "ISO-8859-1": latin_1(tmp_path_factory.mktemp("locales")),
        "ascii streams": {"PYTHONIOENCODING": "ascii"},
    }
    for name, value in settings[locale].items():
        monkeypatch.setenv(name, value)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    small = [word for word in SMALL if not word.startswith("prompts.")]
    command = [EXPERIMENT, *small, f"model.path={model}", "prompts.file=prompts.txt", "run.name=run"]
    done = launch(*command, "run.batches=1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "batch 1/1" in done.stdout and "Traceback" not in done.stdout + done.stderr
    without_ray = [sys.executable, "-m", "workers.local", *command, "run.batches=2"]
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    goes_on = subprocess.run(without_ray, cwd=tmp_path, capture_output=True, timeout=TIMEOUT_S)
    assert goes_on.returncode == 0 and b"Traceback" not in goes_on.stdout + goes_on.stderr, goes_on.stderr
    run = tmp_path / "runs" / "run"
    for name in ("config.yaml", "metrics.jsonl", "run.json", "report.html"):
        (run / name).read_bytes().decode("utf-8")
    assert (run / "prompts.txt").read_bytes().decode("utf-8") == "".join(f"{prompt}\n" for prompt in PROMPTS)
    assert PROMPTS[0] in (run / "report.html").read_text(encoding="utf-8")
    (*_, rows) = sorted((run / "trajectories").glob("*.parquet"))
    assert set(pq.read_table(rows)["prompt"].to_pylist()) <= set(PROMPTS)


@pytest.mark.parametrize("encoding", ["ascii", "iso-8859-1", "utf-8", "cp1252"])
def test_what_a_terminal_has_no_sign_for_is_written_in_signs_that_it_has(encoding: str) -> None:
    text = "".join(PLAIN) + PROMPTS[0] + "\ud800"
    code = f"from common.terminal import print_anywhere; print_anywhere(); print({text!a})"
    environment = dict(os.environ, PYTHONIOENCODING=encoding)
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, check=True)
    line = shown.stdout.decode(encoding)
    assert "zwei F" in line and "\\ud800" in line
    assert ("±" in line) is (encoding != "ascii") and ("+-" in line) is (encoding == "ascii")
