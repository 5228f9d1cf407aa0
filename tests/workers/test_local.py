"""workers/local.py: a whole run without Ray, and the same one with it."""

from pathlib import Path

from safetensors import safe_open

from buffer.run_folder import read_metrics
from conf.load import load
from conf.prompts import resolve_prompts
from conf.schema import Config
from tests.chaos.verdict import WEIGHTS, different
from tests.pipelines import tiny_pipeline
from tests.running import SMALL, launch
from workers import local

KEPT = ["run.batches=3", "buffer.keep_batches=3", "evaluation.every=3"]


def start(*arguments: str) -> Path:
    config: Config = load(["compressibility", *SMALL, *arguments])
    return local.run(config, resolve_prompts(config.prompts))


def lora_of(run_dir: Path) -> tuple[dict[str, str], dict[str, bytes]]:
    """Metadata and weights; the file itself has its header's keys in another order each time."""
    with safe_open(run_dir / "lora" / WEIGHTS[0], framework="np") as file:
        return file.metadata(), {key: file.get_tensor(key).tobytes() for key in file.keys()}  # noqa: SIM118


def test_it_leaves_the_same_bits_as_actors_do(tmp_path: Path) -> None:
    """Weights, optimizer, tracker, rows and scores of three batches, and what people see of them."""
    model = f"model.path={tiny_pipeline(tmp_path / 'model')}"
    here = start(model, *KEPT, f"run.dir={tmp_path}", "run.name=here")
    done = launch("compressibility", *SMALL, model, *KEPT, "run.dir=runs", "run.name=there", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    there = tmp_path / "runs" / "there"
    assert different(here, there) == []
    for name in ("samples/v00000.png", "samples/v00003.png"):
        assert (here / name).read_bytes() == (there / name).read_bytes(), name
    assert lora_of(here) == lora_of(there)
    assert (here / "report.html").exists()
    taken_by_time = ("time", "images_per_s", "throughput/", "capacity/", "waiting/")
    ours, theirs = (
        [{key: value for key, value in row.items() if not key.startswith(taken_by_time)} for row in read_metrics(path)]
        for path in (here / "metrics.jsonl", there / "metrics.jsonl")
    )
    assert sorted(ours, key=str) == sorted(theirs, key=str)


def test_it_goes_on_from_where_it_was_ended(tmp_path: Path) -> None:
    model = f"model.path={tiny_pipeline(tmp_path / 'model')}"
    whole = start(model, *KEPT, f"run.dir={tmp_path}", "run.name=whole")
    start(model, *KEPT, f"run.dir={tmp_path}", "run.name=parts", "run.batches=2", "evaluation.every=3")
    parts = start(model, *KEPT, f"run.dir={tmp_path}", "run.name=parts")
    assert different(parts, whole) == []
