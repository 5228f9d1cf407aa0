"""What can be answered from the settings alone is answered before Ray, torch and the like are imported."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.running import ROOT

SLOW = ("ray", "torch", "torchvision", "diffusers", "transformers", "peft", "tensorboard")
LAUNCH = """
import sys
import launch
code = launch.main(sys.argv[2:])
print("imported:", *[name for name in sys.argv[1].split(",") if name in sys.modules])
sys.exit(code)
"""


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--help"], 0),
        (["compresibility"], 2),
        (["compressibility", "learner.lrr=1e-4"], 2),
        (["compressibility", "learner.lr"], 2),
        (["compressibility", "learner.lr=fast"], 2),
        (["compressibility", "learner.lr=0"], 2),
        (["compressibility", "buffer.order_size=24"], 2),
        (["compressibility", "prompts.set=emoji_finetun"], 2),
        (["compressibility", "prompts.file=nosuch.txt"], 2),
        (["compressibility", "prompts.file=empty.txt"], 2),
        (["compressibility", "model.path=nowhere/at/all"], 2),
        (["compressibility", "model.path=."], 2),
        (["nosuch.yaml"], 2),
        (["broken.yaml"], 2),
        (["--scale", "nowhere", "samplers.count=2"], 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_answer_needs_no_slow_import(words: list[str], code: int, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "broken.yaml").write_text("learner: {lr: 1e-4")
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{LAUNCH}", ",".join(SLOW), *words]
    answer = subprocess.run(command, cwd=tmp_path, capture_output=True, encoding="utf-8", check=False)
    assert answer.returncode == code, answer.stderr
    assert answer.stdout.splitlines()[-1] == "imported:"
