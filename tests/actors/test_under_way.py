"""A request for other counts that cannot be granted never stops a real run, nor does one that was left from before."""

import signal
from pathlib import Path

import pytest

from conf.load import from_file
from conf.scale import REFUSED, REQUEST
from tests.pipelines import tiny_pipeline
from tests.running import SMALL, TIMEOUT_S, launched, wait_for

BAD = [
    b"samplers: {count: 2",
    b"\xff\xfe\x00",
    b"",
    b"samplers: 3\n",
    b"samplers: {count: 0}\n",
    b"learner: {lr: 1}\n",
    None,  # a folder of that name
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline(tmp_path_factory.mktemp("models") / "tiny")


def test_bad_requests_are_set_aside_and_the_run_goes_on(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "run"
    command = ["compressibility", *SMALL, f"model.path={model}", "run.name=run", "evaluation.every=1000"]
    with launched(*command, "run.batches=1000", cwd=tmp_path) as run:
        run.wait_for_line("batch 1/")
        for number, content in enumerate(BAD, start=1):
            (folder / REQUEST).mkdir() if content is None else (folder / REQUEST).write_bytes(content)
            wait_for("a refused request", lambda n=number: len(list(folder.glob(REFUSED))) == n, run)  # type: ignore[misc]
        run.process.send_signal(signal.SIGINT)
        output, errors = run.process.communicate(timeout=TIMEOUT_S)
    assert run.process.returncode == 0, errors
    assert output.count("scale.yaml, is set aside") >= len(BAD) - 1  # the same sentence is not said twice
    (folder / REQUEST).write_text("samplers: {count: 2}\n")
    with launched(*command, "run.batches=1000", cwd=tmp_path) as run:
        run.wait_for_line("a request for other counts, scale.yaml, is set aside: it was left from before this start")
        run.wait_for_line("batch ")
        run.process.send_signal(signal.SIGINT)
        _, errors = run.process.communicate(timeout=TIMEOUT_S)
    assert run.process.returncode == 0, errors
    assert from_file(folder / "config.yaml").samplers.count == 1
