"""Small files of a run that a disk or a hand has spoilt: a sentence that says what to do, never a traceback."""

import shutil
from pathlib import Path

import pytest

from buffer.journal import Journal
from buffer.run_folder import RECORD as NAME
from buffer.run_folder import RunFolder, read_metrics
from common.errors import UserError
from conf.load import load
from conf.resume import RunLock, check_resume, check_same, save_config
from mirror.epochs import MEMORY, Epochs
from mirror.remote import Remote
from report.record import record_end
from report.report import write_report
from tests.synthetic_run import synthetic_run

ROW = b'{"batch": 0, "time": 5.0}\n'
ROWS = [b'{"batch": 1}', b'{"time": 6.0}', b'{"batch": "x", "time": 6.0}', b'{"batch": 1, "time": 6.0, "loss": null}']
SITTINGS = [
    b'{"sittings": {"1": %s}}' % entry
    for entry in (b"5", b"{}", b'{"started": 1, "ended": 2, "machine": {}, "seconds": 3}')
]
SPOILT = [b"", b"{", b"\xff\xfe\x00", b"[]", b"7", b'{"a": 1}', b"\x00" * 40]


@pytest.mark.parametrize("content", [*SPOILT, *SITTINGS], ids=repr)
def test_a_spoilt_record_of_the_run_is_a_sentence(content: bytes, tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(content)
    for look in (lambda folder: RunFolder(folder).record, lambda folder: record_end(folder, 3)):
        with pytest.raises(UserError, match="put it back, or remove it"):
            look(tmp_path)
    (tmp_path / NAME).unlink()
    record_end(tmp_path, 3)
    assert RunFolder(tmp_path).record["finished"] == 3


@pytest.mark.parametrize("content", [*ROWS, b"{", b"\xff\xfe", b"[]", b"7", b"\x00" * 40], ids=repr)
def test_a_spoilt_row_of_metrics_is_a_sentence_and_a_torn_last_one_is_left_out(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(ROW + content)
    assert read_metrics(path) == [{"batch": 0, "time": 5.0}]
    path.write_bytes(ROW + content + b"\n")
    with pytest.raises(UserError, match="in line 2"):
        read_metrics(path)


@pytest.mark.parametrize("content", [*SPOILT, b'{"file:///m": {}}'], ids=repr)
def test_spoilt_claims_on_a_mirror_are_a_sentence(content: bytes, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / MEMORY).write_bytes(content)
    with pytest.raises(UserError, match=r"mirror\.json is damaged"):
        Epochs(Remote.at(str(tmp_path / "mirror"), run_dir), "file:///m", run_dir)


@pytest.mark.parametrize("content", SPOILT, ids=repr)
def test_a_spoilt_lock_is_nobodys(content: bytes, tmp_path: Path) -> None:
    (tmp_path / ".run.lock").write_bytes(content)
    with RunLock(tmp_path / "run"), pytest.raises(UserError, match="in use by another driver"):
        (tmp_path / ".run.lock").write_bytes(content)
        RunLock(tmp_path / "run").__enter__()


def test_spoilt_prompts_are_a_sentence(tmp_path: Path) -> None:
    config = load(["compressibility"])
    save_config(tmp_path, config, ["a cat"])
    (tmp_path / "prompts.txt").write_bytes(b"a cat\xff\n")
    with pytest.raises(UserError, match=r"prompts\.txt cannot be read"):
        check_same(tmp_path, config, ["a cat"])


def test_what_others_put_beside_a_runs_files_is_left_alone(tmp_path: Path) -> None:
    run_dir = synthetic_run(tmp_path, batches=4)
    shutil.copy(run_dir / "samples" / "v00000.train.png", run_dir / "samples" / "v00000-copy.png")
    for folder in ("evaluation", "trajectories"):
        (run_dir / folder / "mine.parquet").write_bytes(b"nothing that a run wrote")
    (run_dir / "journal").mkdir(exist_ok=True)
    (run_dir / "journal" / "epoch-000001 (copy).jsonl").write_bytes(b"{}")
    assert write_report(run_dir).exists()
    assert Journal(run_dir / "journal").epoch == 1


@pytest.mark.parametrize("folder", ["evaluation", "trajectories"])
def test_a_damaged_table_is_named_in_a_sentence(folder: str, tmp_path: Path) -> None:
    run_dir = synthetic_run(tmp_path, batches=4)
    path = max((run_dir / folder).glob("*.parquet"))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=rf"{path.name} is damaged"):
        write_report(run_dir)


def test_a_run_folder_that_is_a_link_to_nowhere_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "run").symlink_to(tmp_path / "scratch")
    with pytest.raises(UserError, match=r"is a link to .*scratch, which is not there"):
        check_resume(tmp_path / "run", load(["compressibility"]), ["a cat"])
