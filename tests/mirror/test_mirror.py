"""The mirror: a head lost at every moment, heads that race, a head that comes back, a mirror that fails."""

import itertools
import re
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow.fs import FileInfo, FileSelector, FileSystemHandler, LocalFileSystem, PyFileSystem

from buffer.buffer import TrajectoryBuffer
from buffer.state import restarted
from common.errors import RunStopped, UserError
from mirror.epochs import Epochs, epoch_of
from mirror.mirror import Mirror, Overtaken
from mirror.mirroring import Mirroring
from mirror.remote import Remote
from tests.buffer.test_run import rows
from tests.buffer_toy import PLAN, buffer, evaluations, publish, roll_out, score, scored, start, train, write_weights
from tests.running import TIMEOUT_S

URI = "file:///mirror"  # as sentences name it


class Cable(FileSystemHandler):
    """A local file system that fails from its n-th operation on, for so many operations: a write in the middle."""

    def __init__(self, fails_at: float, failures: float = float("inf")) -> None:
        self.disk = LocalFileSystem()
        self.fails_at, self.failures = fails_at, failures
        self.operations = 0

    def _pass(self) -> bool:
        self.operations += 1
        return not self.fails_at <= self.operations < self.fails_at + self.failures

    def _check(self) -> None:
        if not self._pass():
            raise OSError("the cable is cut")

    def get_type_name(self) -> str:
        return "cable"

    def normalize_path(self, path: str) -> str:
        return path

    def get_file_info(self, paths: list[str]) -> list[FileInfo]:
        self._check()
        found: list[FileInfo] = self.disk.get_file_info(paths)
        return found

    def get_file_info_selector(self, selector: FileSelector) -> list[FileInfo]:
        self._check()
        found: list[FileInfo] = self.disk.get_file_info(selector)
        return found

    def create_dir(self, path: str, recursive: bool) -> None:
        self._check()
        self.disk.create_dir(path, recursive=recursive)

    def delete_file(self, path: str) -> None:
        self._check()
        self.disk.delete_file(path)

    def open_input_stream(self, path: str) -> pa.NativeFile:
        self._check()
        return self.disk.open_input_stream(path)

    def open_output_stream(self, path: str, metadata: Any) -> pa.NativeFile:
        if self._pass():
            return self.disk.open_output_stream(path)
        with self.disk.open_output_stream(path) as stream:
            stream.write(b"half of")
        raise OSError("the cable is cut")

    def _no(self, *_: object) -> None:
        raise NotImplementedError

    delete_dir = delete_dir_contents = delete_root_dir_contents = move = copy_file = _no
    open_input_file = open_append_stream = _no


def remote(folder: Path, cable: Cable | None = None) -> Remote:
    return Remote(PyFileSystem(cable) if cable else LocalFileSystem(), str(folder))


def new_head(folder: Path, run: Path, cable: Cable | None = None) -> Mirror:
    """A head that starts on `run`, restored from the mirror if it is not there, and has claimed the mirror."""
    mirror = Mirror(remote(folder, cable), URI, run)
    if not mirror.prepare(lambda _: None) and mirror.fresh:
        run.mkdir()
        (run / "prompts.txt").write_text("a cat\n")
        (run / "config.yaml").write_text("seed: 7\n")
    mirror.claim()
    return mirror


def write_metrics(b: TrajectoryBuffer) -> None:
    """As the driver does: a row a trained batch."""
    (b.run_dir / "metrics.jsonl").write_text("".join(f'{{"batch": {i}}}\n' for i in range(max(b.state.next_batch, 0))))


def go_on(b: TrajectoryBuffer, after_each: Callable[[], Any], batches: int = 99) -> None:
    """Until so many batches are trained, or the run is finished."""
    start(b)
    for _ in range(1000):
        write_metrics(b)
        after_each()
        if b.finished or b.state.next_batch >= batches:
            return
        roll_out(b)
        score(b)
        train(b)
        publish(b)
    raise AssertionError(b.news())


def syncing(mirror: Mirror, b: TrajectoryBuffer) -> Callable[[], int]:
    return partial(mirror.sync, b.rules.served)


def nothing() -> None:
    """A head without its mirror."""


def settings(k: int) -> dict[str, Any]:
    return {"max_staleness": k, "evaluate_versions": (0, 2, 3)}


def run_with_mirror(folder: Path, run: Path, k: int, cable: Cable | None = None) -> int:
    """A head's run to its end, mirrored after every step. Returns the operations on the mirror."""
    cable = cable or Cable(float("inf"))
    mirror = new_head(folder, run, cable)
    b = buffer(run, **settings(k))
    try:
        go_on(b, syncing(mirror, b))
    finally:
        b.close()
    return cable.operations


def complete(run: Path, k: int) -> None:
    """All batches, each trajectory once, in order, none too old, along one line of weights."""
    found = rows(run)
    assert [row["trajectory_id"] for batch in found.values() for row in batch] == list(range(3 * PLAN.batch_size))
    assert all(row["age"] == row["batch"] - row["policy_version"] <= k for batch in found.values() for row in batch)
    b = buffer(run, **settings(k))
    assert b.finished and list(evaluations(b)) == [0, 2, 3]
    digests = [trained.version.digest for trained in b.state.trained]
    assert all(digests[r["policy_version"]] == r["policy_digest"] for batch in found.values() for r in batch)
    b.close()


# ---- a head is lost


@pytest.mark.long
@pytest.mark.parametrize(
    ("k", "every"),
    [(0, 17), (2, 23), pytest.param(0, 1, marks=pytest.mark.slow), pytest.param(2, 1, marks=pytest.mark.slow)],
)
def test_a_head_lost_at_any_operation_is_followed_by_one_that_finishes_the_run(
    tmp_path: Path, k: int, every: int
) -> None:
    """At every operation on the mirror (or every so many-th): half a file is written, and head and disk are gone."""
    operations = run_with_mirror(tmp_path / "calm mirror", tmp_path / "calm", k)
    complete(tmp_path / "calm", k)
    calm = rows(tmp_path / "calm")
    for fails_at in range(1, operations + 1, every):
        folder, run = tmp_path / f"mirror {fails_at}", tmp_path / f"run {fails_at}"
        with pytest.raises((OSError, UserError), match="the cable is cut"):
            run_with_mirror(folder, run, k, Cable(fails_at))
        trained = len(rows(run))
        shutil.rmtree(run, ignore_errors=True)
        mirror = new_head(folder, run)
        b = buffer(run, **settings(k))
        assert not b.state.work  # nothing beyond HEAD is bound
        assert trained - max(b.state.next_batch, 0) <= 1  # the mirror was asked after every step
        go_on(b, nothing)
        assert mirror.sync(b.rules.served) == 3
        b.close()
        complete(run, k)
        if k == 0:
            assert rows(run) == calm


def test_what_a_person_expects_is_restored(tmp_path: Path) -> None:
    run_with_mirror(tmp_path / "mirror", tmp_path / "run", k=0)
    before = {
        str(path.relative_to(tmp_path / "run")): path.read_bytes()
        for path in (tmp_path / "run").rglob("*.*")
        if path.is_file() and path.parts[-2] not in ("tensors", "journal") and path.name != "mirror.json"
    }
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "prompts.txt").touch()  # of a start that never began
    new_head(tmp_path / "mirror", tmp_path / "run")
    assert {path: (tmp_path / "run" / path).read_bytes() for path in before} == before
    assert {"config.yaml", "prompts.txt", "metrics.jsonl"} < before.keys()
    complete(tmp_path / "run", k=0)


def test_heads_lost_again_and_again(tmp_path: Path) -> None:
    """Each head trains one batch; the state goes on, names are never used twice, and the mirror stays small."""
    epochs, k = [], 1
    for lost in itertools.count():
        run = tmp_path / f"run {lost}"
        mirror = new_head(tmp_path / "mirror", run)
        if lost:
            used = {int(found) for path in run.rglob("*") for found in re.findall(r"\.e(\d{4})\.", path.name)}
            (journal,) = (run / "journal").iterdir()
            assert max(used) < int(journal.stem.split("-")[1])
        b = buffer(run, **settings(k))
        epochs.append(b.epoch)
        begun = b.state.next_batch
        go_on(b, syncing(mirror, b), batches=max(begun, 0) + 1)
        b.close()
        if b.finished:
            break
        shutil.rmtree(run)
    complete(run, k)
    assert epochs == sorted(set(epochs)) and len(epochs) >= 3
    left = [path for path in (tmp_path / "mirror").rglob("*") if path.is_file() and path.parent.name != "epochs"]
    assert len([path for path in left if path.name.startswith("head-")]) == 1
    assert len([path for path in left if path.name == "weights"]) == k + 1
    assert len([path for path in left if "trajectories" in path.parts]) == 3
    assert not [path for path in (tmp_path / "mirror").rglob("*") if path.is_dir() and not any(path.iterdir())]


def test_a_damaged_copy_is_named_and_nothing_is_restored_from_it(tmp_path: Path) -> None:
    run_with_mirror(tmp_path / "mirror", tmp_path / "run", k=0)
    shutil.rmtree(tmp_path / "run")
    victim = next((tmp_path / "mirror").rglob("b00001*.parquet"))
    victim.write_bytes(victim.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=f"{victim.name} is not as it was written"):
        new_head(tmp_path / "mirror", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_head_record_that_is_not_whole_counts_for_nobody(tmp_path: Path) -> None:
    run_with_mirror(tmp_path / "mirror", tmp_path / "run", k=0)
    shutil.rmtree(tmp_path / "run")
    whole = next((tmp_path / "mirror").glob("*/head-*.json"))
    changed = whole.read_bytes().replace(b'"epoch": 1', b'"epoch": 7')
    assert changed != whole.read_bytes()
    for number, content in enumerate((b"", whole.read_bytes()[:-30], changed)):
        whole.with_name(f"head-{900000 + number}.json").write_bytes(content)
    new_head(tmp_path / "mirror", tmp_path / "run")
    assert buffer(tmp_path / "run", **settings(0)).epoch == 3


def test_what_a_head_writes_before_another_claims_is_not_missed(tmp_path: Path) -> None:
    """The last moment: the new head has read a HEAD, the old one writes another and removes what the first named."""
    old = new_head(tmp_path / "mirror", tmp_path / "old")
    b = buffer(tmp_path / "old", **settings(0))
    go_on(b, syncing(old, b), batches=1)
    new = Mirror(remote(tmp_path / "mirror"), URI, tmp_path / "new")
    assert new.prepare(lambda _: go_on(b, syncing(old, b), batches=2))
    assert buffer(tmp_path / "new", **settings(0)).state.next_batch == 2


def test_other_settings_are_refused_before_anything_is_claimed(tmp_path: Path) -> None:
    run_with_mirror(tmp_path / "mirror", tmp_path / "run", k=0)
    claims = sorted((tmp_path / "mirror" / "epochs").iterdir())

    def check(restored: Path) -> None:
        assert (restored / "config.yaml").read_text() == "seed: 7\n"
        raise UserError("begun with other settings")

    with pytest.raises(UserError, match="other settings"):
        Mirror(remote(tmp_path / "mirror"), URI, tmp_path / "other").prepare(check)
    assert sorted((tmp_path / "mirror" / "epochs").iterdir()) == claims
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mirror", "run"]


def test_a_restored_journal_is_of_its_plan(tmp_path: Path) -> None:
    run_with_mirror(tmp_path / "mirror", tmp_path / "run", k=0)
    shutil.rmtree(tmp_path / "run")
    new_head(tmp_path / "mirror", tmp_path / "run")
    with pytest.raises(UserError, match=r"seed 7 \(now 8\)"):
        buffer(tmp_path / "run", replace(PLAN, seed=8))


def test_set_aside_pictures_are_still_counted(tmp_path: Path) -> None:
    mirror = new_head(tmp_path / "mirror", tmp_path / "run")
    b = buffer(tmp_path / "run", batches=1, max_staleness=0)
    start(b)
    while not b.finished:
        roll_out(b)
        if lease := b.lease("size", "r0"):
            first = lease.table["trajectory_id"][0].as_py()
            if lease.order_id == "b00000.00" and first not in lease.skip:
                b.pictures_failed("size", lease.order_id, lease.table_digest, "r0", {first: "it is black"})
            else:
                b.add_scores("size", lease.order_id, lease.table_digest, scored(lease))
        train(b)
        publish(b)
    mirror.sync(b.rules.served)
    before = restarted(b.state)
    assert before.set_aside == {"size: it is black": 1}
    shutil.rmtree(tmp_path / "run")
    new_head(tmp_path / "mirror", tmp_path / "run")
    after = buffer(tmp_path / "run", batches=1, max_staleness=0).state
    assert after.trained == before.trained and after.set_aside == before.set_aside


# ---- epochs


def test_of_racing_heads_none_owns_an_epoch_with_another(tmp_path: Path) -> None:
    """Heads that claim at once, many times: no two ever win the same epoch."""
    rounds, heads = 15, 4
    won: list[str] = []
    gate = threading.Barrier(heads, timeout=TIMEOUT_S)

    def claim(place: int) -> None:
        epochs = Epochs(remote(tmp_path / "mirror"), URI, tmp_path / str(place))
        try:
            for _ in range(rounds):
                gate.wait()
                epochs.take(over=True, remember=False)
                won.append(epochs.held)
        except BaseException:
            gate.abort()  # the others need not wait for one that failed
            raise

    with ThreadPoolExecutor(heads) as pool:
        list(pool.map(claim, range(heads)))
    assert len(won) == rounds * heads
    assert len({epoch_of(name) for name in won}) == len(won)


def test_heads_that_write_and_remove_in_one_folder_do_not_stumble_over_it(tmp_path: Path) -> None:
    """The folder comes and goes with its last file, whoever writes to it at that moment."""

    def come_and_go(place: int) -> None:
        mirror = remote(tmp_path / "mirror")
        for _ in range(300):
            mirror.write(f"epochs/{place}", b"")
            assert mirror.read(f"epochs/{place}") == b"" and f"epochs/{place}" in mirror.files("epochs")
            mirror.remove([f"epochs/{place}"])
            assert f"epochs/{place}" not in mirror.files("epochs")

    with ThreadPoolExecutor(4) as heads:
        list(heads.map(come_and_go, range(4)))


def test_a_folder_that_another_head_has_gone_on_from_is_refused(tmp_path: Path) -> None:
    mirror = new_head(tmp_path / "mirror", tmp_path / "old")
    b = buffer(tmp_path / "old", **settings(0))
    go_on(b, syncing(mirror, b), batches=1)
    new_head(tmp_path / "mirror", tmp_path / "new")
    with pytest.raises(UserError, match="another head has gone on"):
        new_head(tmp_path / "mirror", tmp_path / "old")
    again = new_head(tmp_path / "mirror", tmp_path / "new")  # its own later starts are not
    assert epoch_of(again.epochs.held) == 3
    shutil.copytree(tmp_path / "new", tmp_path / "copied")  # both have the claims so far: who starts first goes on
    new_head(tmp_path / "mirror", tmp_path / "copied")
    with pytest.raises(UserError, match="another head has gone on"):
        new_head(tmp_path / "mirror", tmp_path / "new")


def test_a_head_that_comes_back_stops_and_what_it_has_written_counts_for_nobody(tmp_path: Path) -> None:
    old = new_head(tmp_path / "mirror", tmp_path / "old")
    b = buffer(tmp_path / "old", **settings(0))
    go_on(b, syncing(old, b), batches=1)
    new = new_head(tmp_path / "mirror", tmp_path / "new")
    go_on(b, nothing)  # behind its cable it goes on to the end
    heads = sorted((tmp_path / "mirror").glob("*/head-*.json"))
    with pytest.raises(RunStopped, match="Another head has gone on"):
        old.sync(b.rules.served)
    assert sorted((tmp_path / "mirror").glob("*/head-*.json")) == heads
    c = buffer(tmp_path / "new", **settings(0))
    assert c.state.next_batch == 1
    go_on(c, syncing(new, c))
    with pytest.raises(RunStopped, match="Another head has gone on"):
        old.sync(b.rules.served)
    new_head(tmp_path / "mirror", tmp_path / "newest")
    complete(tmp_path / "newest", 0)
    assert rows(tmp_path / "newest") == rows(tmp_path / "new")


def test_a_claim_that_its_head_could_not_remember_as_won_is_its_own(tmp_path: Path) -> None:
    """It died between the claim and the word in its run folder."""
    mirror = new_head(tmp_path / "mirror", tmp_path / "run")
    mirror.epochs.trying = "000002-00aabbccddee"
    mirror.epochs.save(tmp_path / "run")
    mirror.remote.write(f"epochs/{mirror.epochs.trying}", b"")
    assert epoch_of(new_head(tmp_path / "mirror", tmp_path / "run").epochs.held) == 3


# ---- a mirror that lags


def test_a_mirror_that_was_away_skips_what_retention_has_removed(tmp_path: Path) -> None:
    mirror = new_head(tmp_path / "mirror", tmp_path / "run")
    b = buffer(tmp_path / "run", **settings(1))
    go_on(b, nothing)
    assert mirror.sync(b.rules.served) == 3
    weights = [path.parent.name.split(".")[0] for path in (tmp_path / "mirror").rglob("weights")]
    assert sorted(weights) == ["v00002", "v00003"]
    shutil.rmtree(tmp_path / "run")
    new_head(tmp_path / "mirror", tmp_path / "run")
    complete(tmp_path / "run", 1)


def test_a_recovery_point_that_goes_while_it_is_copied_means_a_later_head(tmp_path: Path) -> None:
    """Retention removes what is being copied, because the run has gone on; if it has not, the file is missed."""
    run = tmp_path / "run"
    mirror = new_head(tmp_path / "mirror", run)
    b = buffer(run, **settings(0))
    go_on(b, nothing, batches=1)
    asked = 0

    def served(state: Any) -> set[int]:
        nonlocal asked
        if (asked := asked + 1) == 1:
            go_on(b, nothing, batches=2)
        return b.rules.served(state)

    assert mirror.sync(served) == 2
    shutil.rmtree(run / b.state.trained[2].recovery_point)
    mirror = new_head(tmp_path / "mirror", run)
    with pytest.raises(Overtaken):
        mirror.sync(b.rules.served)
    write_weights(run / b.state.trained[2].recovery_point, b.state.trained[2].version)
    assert mirror.sync(b.rules.served) == 2


def test_a_start_copies_nothing_that_is_there_already(tmp_path: Path) -> None:
    run_with_mirror(tmp_path / "mirror", tmp_path / "run", k=0)
    mirror = new_head(tmp_path / "mirror", tmp_path / "run")
    assert mirror.sync(buffer(tmp_path / "run", **settings(0)).rules.served) == 3
    assert mirror.copies == 0


@pytest.mark.long
def test_a_mirror_that_fails_holds_nothing_up_and_is_complete_in_the_end(tmp_path: Path) -> None:
    mirror = new_head(tmp_path / "mirror", tmp_path / "run")
    cable = Cable(fails_at=1, failures=2)  # twice: tried again after one second and after two
    mirror.remote.fs = mirror.epochs.remote.fs = PyFileSystem(cable)
    b = buffer(tmp_path / "run", **settings(0))
    with Mirroring(mirror, b.rules.served) as mirroring:
        mirroring.start()
        began = time.monotonic()
        go_on(b, lambda: mirroring.follow(max(b.state.next_batch, 0), len(evaluations(b))))
        assert mirroring.behind == 3 or time.monotonic() - began > 1.0
        mirroring.finish()
    assert mirroring.behind == 0 and mirroring.failures == 2
    first, *_, last = mirroring.notes
    assert "the cable is cut" in first and "batches behind" in first and "up to date again" in last
    shutil.rmtree(tmp_path / "run")
    new_head(tmp_path / "mirror", tmp_path / "run")
    complete(tmp_path / "run", 0)


def test_a_mirror_that_never_comes_back_stops_a_finished_run_with_a_sentence(tmp_path: Path) -> None:
    mirror = new_head(tmp_path / "mirror", tmp_path / "run")
    mirror.remote.fs = PyFileSystem(Cable(fails_at=1))
    b = buffer(tmp_path / "run", **settings(0))
    with Mirroring(mirror, b.rules.served) as mirroring:
        mirroring.start()
        go_on(b, lambda: mirroring.follow(max(b.state.next_batch, 0), 0))
        with pytest.raises(RunStopped, match=r"not complete.*the cable is cut.*same command"):
            mirroring.finish(patience_s=0.5)


def test_a_head_that_comes_back_hears_of_it_from_its_thread(tmp_path: Path) -> None:
    mirror = new_head(tmp_path / "mirror", tmp_path / "old")
    b = buffer(tmp_path / "old", **settings(0))
    go_on(b, syncing(mirror, b), batches=1)
    with Mirroring(mirror, b.rules.served) as mirroring:
        mirroring.start()
        new_head(tmp_path / "mirror", tmp_path / "new")
        go_on(b, nothing)
        with pytest.raises(RunStopped, match="Another head has gone on"):
            mirroring.follow(3, 0)
            mirroring.finish()
