"""TrajectoryBuffer with its files: restarts, late and wrong calls, failures, damage, retention, evaluations, epochs."""

import errno
import itertools
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from buffer import store
from buffer.buffer import TrajectoryBuffer
from buffer.orders import Evaluation, FixedSet, Version, parse
from buffer.protocol import Charged, Claim, Lease, Refused
from buffer.rows import Combination
from buffer.rules import SetRules
from buffer.schema import tensors_of
from buffer.state import File, restarted
from common.errors import RunStopped, UserError
from conf.evaluations import FIRST
from tests.buffer_toy import (
    PLAN,
    PROMPTS,
    TRAIN,
    V0,
    buffer,
    evaluations,
    finish,
    missed,
    publish,
    roll_out,
    rolled_out,
    score,
    scored,
    start,
    train,
    written,
)
from tests.running import ROOT

TIMES = ["claimed", "rolled_out", "scored", "trained"]


def rows(run: Path) -> dict[int, list[dict[str, Any]]]:
    """What was trained on, by batch, but for its times."""
    files = sorted((run / "trajectories").glob("*.parquet"))
    tables = [pq.read_table(file) for file in files]
    return {table["batch"][0].as_py(): table.drop_columns(TIMES).to_pylist() for table in tables}


def file_of(b: TrajectoryBuffer, order_id: str, kind: str) -> str:
    """Where an order's "images" or "latents" are."""
    file: File = getattr(b.state.work[order_id].rollout, kind)
    return file.path


def make_orders(b: TrajectoryBuffer, count: int) -> None:
    """Rolls out and scores the next so many orders."""
    for _ in range(count):
        roll_out(b)
        score(b)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# ---- a run, and the same run with restarts


def test_a_run_trains_every_trajectory_once_in_order_and_young_enough(tmp_path: Path) -> None:
    b = buffer(tmp_path, max_staleness=1)
    finish(b)
    found = rows(tmp_path)
    assert list(found) == [0, 1, 2]
    assert [row["trajectory_id"] for batch in found.values() for row in batch] == list(range(3 * PLAN.batch_size))
    for batch, its_rows in found.items():
        orders = {order.order_id: order for order in PLAN.batch(batch)}
        for row in its_rows:
            order = orders[row["order_id"]]
            place = order.trajectory_ids.index(row["trajectory_id"])
            assert (row["prompt"], row["seed"]) == (order.prompts[place], order.seeds[place])
            assert row["age"] == batch - row["policy_version"] <= 1
            assert 0 <= row["age_in_flight"] <= row["age"]
    assert b.take("learner") is None and b.claim("s0") is None


def test_the_age_is_split_into_what_passed_in_flight_and_what_passed_waiting(tmp_path: Path) -> None:
    b = buffer(tmp_path, max_staleness=2)
    start(b)
    for _ in range(4 + 4 + 3):  # batches 0 and 1 and most of batch 2, all at version 0
        roll_out(b)
        score(b)
    late = b.claim("s1")
    assert late is not None and late.order.order_id == "b00002.03" and late.version.number == 0
    train(b)
    publish(b)
    b = buffer(tmp_path, max_staleness=2)  # a restart forgets nothing of it
    start(b)
    assert b.add(late.order.order_id, late.version, rolled_out(late.order, late.version))
    score(b)
    train(b)
    publish(b)
    train(b)
    split = {row["order_id"]: (row["age"], row["age_in_flight"]) for batch in rows(tmp_path).values() for row in batch}
    assert {split[f"b00001.{i:02d}"] for i in range(4)} == {(1, 0)}
    assert {split[f"b00002.{i:02d}"] for i in range(3)} == {(2, 0)}
    assert split["b00002.03"] == (2, 1)  # it came when version 1 was there, and waited for batch 1


@pytest.mark.parametrize("k", [0, 2])
def test_with_restarts_after_every_call_the_synchronous_run_is_the_same(tmp_path: Path, k: int) -> None:
    """A new buffer takes over after each call; at k = 0 the rows are the same bit for bit, else nothing is lost."""
    finish(buffer(tmp_path / "calm", max_staleness=k))
    run = tmp_path / "torn"
    start(buffer(run, max_staleness=k))
    steps: list[Callable[[TrajectoryBuffer], Any]] = [roll_out, score, train]
    for call in range(500):
        b = buffer(run, max_staleness=k)
        if b.finished:
            break
        publish(b)
        steps[call % 3](b)
    assert b.finished and b.epoch > 20
    if k == 0:
        assert rows(run) == rows(tmp_path / "calm")
    assert [row["trajectory_id"] for batch in rows(run).values() for row in batch] == list(range(3 * PLAN.batch_size))


def test_the_state_after_a_restart_is_the_state_before(tmp_path: Path) -> None:
    b = buffer(tmp_path, evaluate_versions=(0, 2))
    start(b)
    for _ in range(40):
        for call in (roll_out, score, train):
            call(b)
            publish(b)
        b.claim("idle")
        b.lease("size", "idle")
        after = buffer(tmp_path, evaluate_versions=(0, 2))
        assert after.state == restarted(b.state)._replace(epoch=b.epoch + 1)
        assert not after.state.claims and not after.state.leases and after.state.taken is None
        b = after
        publish(b)
    assert b.finished


def test_another_plan_is_refused_and_nothing_is_touched(tmp_path: Path) -> None:
    start(buffer(tmp_path))
    before = tree(tmp_path)
    with pytest.raises(UserError, match=r"seed 7 \(now 8\)"):
        buffer(tmp_path, replace(PLAN, seed=8))
    with pytest.raises(UserError, match="prompts"):
        buffer(tmp_path, replace(PLAN, prompts=("another",)))
    others = FixedSet("others", 2, PROMPTS)
    with pytest.raises(UserError, match=r"sets .*others"):
        buffer(tmp_path, replace(PLAN, sets=(TRAIN, others)))
    assert tree(tmp_path) == before
    assert buffer(tmp_path).epoch == 2


def test_evaluation_sets_in_another_order_are_another_plan(tmp_path: Path) -> None:
    """Their trajectories have other ids."""
    sets = (TRAIN, FixedSet("others", 2, PROMPTS))
    start(buffer(tmp_path, replace(PLAN, sets=sets)))
    with pytest.raises(UserError, match=r"sets {'train': .*'others': .*} \(now {'others': .*'train': .*}\)"):
        buffer(tmp_path, replace(PLAN, sets=sets[::-1]))


# ---- claims and tables


def test_a_claim_stays_bound_when_a_newer_version_is_published(tmp_path: Path) -> None:
    b = buffer(tmp_path)
    start(b)
    make_orders(b, 4)
    early = b.claim("lost")
    assert early and early.order.batch == 1 and early.version == V0
    train(b)
    publish(b)
    newer = b.claim("s0")
    assert newer and newer.version.number == 1
    b.worker_died("lost")
    b = buffer(tmp_path)  # and it is bound for good
    publish(b)
    again = b.claim("s0")
    assert again and again.order == early.order and again.version == V0


def test_the_first_table_counts_whoever_sends_it(tmp_path: Path) -> None:
    now = [0.0]
    b = buffer(tmp_path, clock=lambda: now[0])
    start(b)
    slow = b.claim("slow")
    assert slow
    now[0] = 11.0
    second = b.claim("second")
    assert second and second.order == slow.order and second.version == slow.version
    assert b.overdue() == []
    now[0] = 20.5
    assert b.overdue() == ["slow"]
    b.worker_died("slow")
    table = rolled_out(slow.order, slow.version)
    assert not b.add(slow.order.order_id, Version(0, "other weights"), table)
    assert b.add(slow.order.order_id, slow.version, table)
    assert not b.add(slow.order.order_id, slow.version, rolled_out(slow.order, slow.version, "other device"))
    files = [path.name for path in (tmp_path / "tensors").iterdir()]
    assert len(files) == 2  # what does not count is not even written
    with pytest.raises(ValueError, match="other trajectories"):
        claim = b.claim("s0")
        assert claim
        b.add(claim.order.order_id, claim.version, table)


def test_versions_that_the_journal_does_not_have_cannot_be_published(tmp_path: Path) -> None:
    b = buffer(tmp_path)
    start(b)
    for version in (Version(0, "other"), Version(1, "weights-1"), Version(-1, "")):
        with pytest.raises(Refused):
            b.publish(version, None)


# ---- failures


def test_a_rollout_that_raises_three_times_is_set_aside_with_the_reason(tmp_path: Path) -> None:
    b = buffer(tmp_path, batches=1)
    start(b)
    for _ in range(3):
        claim = b.claim("s0")
        assert claim and claim.order.order_id == "b00000.00"
        b.order_failed(claim.order.order_id, "s0", "nan in latents")
        b.order_failed(claim.order.order_id, "s0", "said twice")  # not a holder any more
    assert b.news().set_aside == {"nan in latents": 2}
    finish(b)
    found = rows(tmp_path)[0]
    assert [row["set_aside"] for row in found] == ["nan in latents"] * 2 + [None] * 6
    assert [row["advantage"] is None for row in found] == [True] * 2 + [False] * 6
    assert sum(b.news().set_aside.values()) == 2


def test_a_picture_that_raises_is_set_aside_and_the_others_are_scored(tmp_path: Path) -> None:
    b = buffer(tmp_path, batches=1)
    start(b)
    roll_out(b)
    for attempt in range(3):
        lease = b.lease("size", "r0")
        assert lease and lease.skip == ()
        b.pictures_failed("size", lease.order_id, lease.table_digest, "r0", {1: f"too dark {attempt}"})
    lease = b.lease("size", "r0")
    assert lease and lease.skip == (1,) and lease.table.num_rows == 2  # the shape stays
    assert b.add_scores("size", lease.order_id, lease.table_digest, scored(lease, caption=["a cat"]))
    finish(b)
    found = rows(tmp_path)[0]
    assert found[1]["set_aside"] == "size: too dark 2" and found[1]["reward"] is None
    assert found[0]["size.caption"] == "a cat" and found[0]["reward"] == found[0]["size"]


def test_failures_with_one_reward_say_nothing_of_another(tmp_path: Path) -> None:
    b = buffer(tmp_path, batches=1, combination=Combination({"size": 1.0, "other": 1.0}))
    start(b)
    roll_out(b)
    first = b.lease("size", "reward-size-0.0")
    assert first
    picture = first.table["trajectory_id"][0].as_py()

    def fails(reward: str) -> None:
        lease = b.lease(reward, f"reward-{reward}-0.0")
        assert lease
        b.pictures_failed(reward, lease.order_id, lease.table_digest, f"reward-{reward}-0.0", {picture: "once"})

    for reward in ("size", "size", "other", "other"):
        fails(reward)
        assert not b.news().set_aside
    fails("other")
    assert b.news().set_aside == {"other: once": 1}


@pytest.mark.parametrize("what", [errno.EIO, errno.EROFS, errno.ESTALE])
def test_a_disk_that_fails_is_named_and_charged_to_nobody(
    what: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    b = buffer(tmp_path)
    start(b)
    claim = b.claim("s0")
    assert claim

    def fails(descriptor: int) -> None:
        raise OSError(what, os.strerror(what))

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(RunStopped, match=f"The disk that holds {tmp_path} failed .*mend it"):
        b.add(claim.order.order_id, claim.version, rolled_out(claim.order, claim.version))
    with pytest.raises(RunStopped, match="failed"):
        b.claim("s1")
    monkeypatch.undo()
    finish(buffer(tmp_path))


def test_a_reason_that_was_never_utf_8_is_kept(tmp_path: Path) -> None:
    b = buffer(tmp_path, batches=1)
    start(b)
    for _ in range(3):
        claim = b.claim("s0")
        assert claim
        b.order_failed(claim.order.order_id, "s0", "no file caf\udce9.png")
    b = buffer(tmp_path, batches=1)
    for _ in range(3):  # a new start tries again
        start(b)
        claim = b.claim("s0")
        assert claim
        b.order_failed(claim.order.order_id, "s0", "no file caf\udce9.png")
    finish(b)
    assert rows(tmp_path)[0][0]["set_aside"] == r"no file caf\udce9.png"


def fail_everything(b: TrajectoryBuffer, orders: int = 100) -> None:
    for call in range(100):
        if call < orders:
            roll_out(b)
        lease = b.lease("size", "r0")
        if lease:
            reasons = dict.fromkeys(lease.table["trajectory_id"].to_pylist(), "no such model")
            b.pictures_failed("size", lease.order_id, lease.table_digest, "r0", reasons)


def test_too_many_failures_stop_the_run_and_a_new_start_tries_again(tmp_path: Path) -> None:
    b = buffer(tmp_path)
    start(b)
    with pytest.raises(RunStopped, match=r"of the 8 pictures of batch 0 failed.*max_failed_share=0.25.*no such model"):
        fail_everything(b)
    with pytest.raises(RunStopped):
        b.take("learner")
    mended = buffer(tmp_path)
    assert mended.stop is None and not mended.news().set_aside
    finish(mended)
    assert all(row["set_aside"] is None for batch in rows(tmp_path).values() for row in batch)
    assert len(rows(tmp_path)) == 3


def test_reopened_pictures_are_scored_by_every_reward(tmp_path: Path) -> None:
    """A reward that scored an order without a picture scores it again once the picture is back."""
    settings: dict[str, Any] = {"combination": Combination({"size": 1.0, "other": 1.0}), "batches": 1}
    b = buffer(tmp_path, **settings)
    start(b)
    roll_out(b)
    for _ in range(3):
        lease = b.lease("size", "r0")
        assert lease
        b.pictures_failed("size", lease.order_id, lease.table_digest, "r0", {0: "dark"})
    score(b, "other")
    score(b, "size")
    b = buffer(tmp_path, **settings)
    finish(b)
    assert all(row["size"] is not None and row["other"] is not None for row in rows(tmp_path)[0])


def test_a_place_where_everything_fails_sets_nothing_aside_while_another_works(tmp_path: Path) -> None:
    """As on a sick device: what fails there goes to the other, whose turn it is, and is made there."""
    b = buffer(tmp_path, batches=1)
    start(b)
    held = b.claim("sampler-1.0")
    assert held
    for incarnation in range(3):
        claim = b.claim(f"sampler-0.{incarnation}")
        assert claim and claim.order.order_id == f"b00000.0{incarnation + 1}"  # never the one that failed here before
        b.order_failed(claim.order.order_id, f"sampler-0.{incarnation}", "boom")
    assert b.claim("sampler-0.3") is None
    assert b.add(held.order.order_id, held.version, rolled_out(held.order, held.version))
    while roll_out(b, "sampler-1.0"):
        pass
    finish(b)
    assert not b.news().set_aside


def test_pictures_that_fail_at_one_place_of_a_reward_are_scored_at_another(tmp_path: Path) -> None:
    b = buffer(tmp_path, batches=1)
    start(b)
    while roll_out(b):
        pass
    assert b.lease("size", "reward-size-1.0")
    seen = []
    while lease := b.lease("size", "reward-size-0.0"):
        seen.append(lease.order_id)
        b.pictures_failed("size", lease.order_id, lease.table_digest, "reward-size-0.0", {lease_id(lease): "boom"})
    assert seen == ["b00000.01", "b00000.02", "b00000.03"]
    while score(b, worker="reward-size-1.0"):
        pass
    assert train(b) and not b.news().set_aside


def lease_id(lease: Lease) -> int:
    """Of its first picture."""
    return int(lease.table["trajectory_id"][0].as_py())


def last_order(b: TrajectoryBuffer, worker: str) -> Claim:
    """Of a batch whose other orders are rolled out: nobody has another to go to."""
    claim = b.claim(worker)
    assert claim and claim.order.order_id == "b00000.03"
    return claim


def test_work_that_fails_at_two_places_is_set_aside(tmp_path: Path) -> None:
    b = buffer(tmp_path, batches=1)
    start(b)
    for _ in range(3):
        roll_out(b, "sampler-1.0")
    b.order_failed(last_order(b, "sampler-0.0").order.order_id, "sampler-0.0", "boom")
    assert b.claim("sampler-0.1") is None  # it is the other's turn
    b.order_failed(last_order(b, "sampler-1.0").order.order_id, "sampler-1.0", "boom")
    b.order_failed(last_order(b, "sampler-0.1").order.order_id, "sampler-0.1", "boom")
    assert b.news().set_aside == {"boom": 2}


def test_the_place_that_is_left_tries_what_failed_there(tmp_path: Path) -> None:
    """The other died, or hangs: without it nothing would ever be set aside, and the run would stand still."""
    now = [0.0]
    b = buffer(tmp_path, batches=1, clock=lambda: now[0])
    start(b)
    assert b.claim("other.0")
    claim = b.claim("one.0")
    assert claim
    b.order_failed(claim.order.order_id, "one.0", "boom")
    skipped = b.claim("one.0")
    assert skipped and skipped.order.order_id != claim.order.order_id
    assert b.add(skipped.order.order_id, skipped.version, rolled_out(skipped.order, skipped.version))
    now[0] = 11.0  # the other has not asked for longer than a claim may take
    assert [c.order.order_id for c in iter(lambda: roll_out(b, "one.0"), None)].count(claim.order.order_id) == 1


def test_who_did_not_hear_the_answer_asks_again_and_hears_it(tmp_path: Path) -> None:
    b = buffer(tmp_path, batches=1)
    start(b)
    claim = b.claim("s0")
    assert claim == b.claim("s0")
    other = b.claim("s1")
    assert claim and other and other.order != claim.order
    assert b.add(claim.order.order_id, claim.version, rolled_out(claim.order, claim.version))
    lease = b.lease("size", "r0")
    assert lease and lease == b.lease("size", "r0")
    assert b.add_scores("size", lease.order_id, lease.table_digest, scored(lease))
    assert b.claim("s1") == other
    assert b.claim("s0") not in (claim, other)


def test_who_works_on_what_others_failures_set_aside_is_not_late(tmp_path: Path) -> None:
    now = [0.0]
    b = buffer(tmp_path, batches=1, clock=lambda: now[0])
    start(b)
    for _ in range(3):
        roll_out(b, "slow")
    last_order(b, "slow")
    now[0] = 21.0
    assert b.overdue() == ["slow"]
    for worker in ("s1", "s2", "s1"):
        b.order_failed(last_order(b, worker).order.order_id, worker, "boom")
    assert sum(b.news().set_aside.values()) == 2 and b.overdue() == []


def test_a_learner_that_hangs_is_overdue(tmp_path: Path) -> None:
    now = [0.0]
    b = buffer(tmp_path, batches=1, train_timeout_s=100.0, clock=lambda: now[0])
    start(b)
    make_orders(b, 4)
    assert b.take("learner-0.0")
    now[0] = 99.0
    assert b.overdue() == []
    now[0] = 101.0
    assert b.overdue() == ["learner-0.0"]
    b.worker_died("learner-0.0")
    assert train(b, "learner-0.1")


@pytest.mark.parametrize(
    ("module", "name"),
    [(os, "fsync"), (store, "read_arrow"), (store.Store, "write_evaluation"), (store.Store, "remove")],
    ids=["flushing", "reading", "an evaluation", "removing"],
)
def test_nobody_is_late_by_a_call_that_the_disk_holds_up(
    module: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole run in which each such operation takes two minutes, beside somebody who holds work all the time."""
    now = [0.0]
    b = buffer(tmp_path, batches=2, evaluate_versions=(1,), train_timeout_s=10.0, clock=lambda: now[0])
    real, hung = getattr(module, name), []

    def hangs(*call: Any, **named: Any) -> Any:
        now[0] += 120.0
        hung.append(name)
        return real(*call, **named)

    start(b)
    monkeypatch.setattr(module, name, hangs)
    while not b.finished:
        publish(b)
        step = b.claim("s0") or b.lease("size", "r0") or b.take("l0")
        assert b.overdue() == [], step
        if isinstance(step, Claim):
            b.add(step.order.order_id, step.version, rolled_out(step.order, step.version))
        elif isinstance(step, Lease):
            b.add_scores("size", step.order_id, step.table_digest, scored(step))
        elif step is not None:
            assert train(b, "l0")
        assert b.overdue() == []
    assert hung


def test_nobody_is_late_by_a_disk_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    b = buffer(tmp_path, batches=2, train_timeout_s=10.0, clock=lambda: now[0])
    start(b)
    make_orders(b, 4)
    assert b.take("learner") and b.claim("sampler") and roll_out(b, "another") and b.lease("size", "reward")
    fsync = os.fsync

    def hangs(fd: int) -> None:
        now[0] += 120.0
        fsync(fd)

    monkeypatch.setattr(os, "fsync", hangs)
    assert roll_out(b, "another")
    monkeypatch.undo()
    assert now[0] >= 360.0 and b.overdue() == []
    now[0] += 30.0
    assert b.overdue() == ["learner", "reward", "sampler"]


@pytest.mark.parametrize(
    ("first", "later"),
    [(1, "one"), (1.5, True), ("one", ["one"]), ([1], ["one"]), (True, 1), (["one"], [1.5])],
)
def test_a_reward_that_answers_in_other_types_stops_the_run_and_goes_on_when_mended(
    first: Any, later: Any, tmp_path: Path
) -> None:
    """Each answer by itself is as it should be, and no batch could be put together of both."""
    clock = partial(next, itertools.count(1000.0))
    b = buffer(tmp_path, batches=1, clock=clock)
    start(b)
    while roll_out(b):
        pass
    lease = b.lease("size", "r0")
    assert lease
    assert b.add_scores("size", lease.order_id, lease.table_digest, scored(lease, found=[first] * 2))
    lease = b.lease("size", "r0")
    assert lease
    with pytest.raises(RunStopped, match=r"Reward size put .* into its column 'found'"):
        b.add_scores("size", lease.order_id, lease.table_digest, scored(lease, found=[later] * 2))
    with pytest.raises(RunStopped):
        b.take("learner")
    b = buffer(tmp_path, batches=1, clock=clock)  # mended the other way: what the first answer said is said again
    publish(b)
    while lease := b.lease("size", "r0"):
        assert b.add_scores("size", lease.order_id, lease.table_digest, scored(lease, found=[later] * 2))
    assert b.take("learner") is None and "is scored with size again" in b.notes[0]
    while lease := b.lease("size", "r0"):
        assert b.add_scores("size", lease.order_id, lease.table_digest, scored(lease, found=[later] * 2))
    assert train(b)
    assert {str(row["size.found"]) for row in rows(tmp_path)[0]} == {str(later)}


def test_numbers_of_both_kinds_and_cells_that_are_left_out_are_one_type(tmp_path: Path) -> None:
    b = buffer(tmp_path, batches=1)
    start(b)
    for answer in ({"found": [1, 2]}, {"found": [1.5, None]}, {"found": [None, None]}, {}):
        roll_out(b)
        lease = b.lease("size", "r0")
        assert lease and b.add_scores("size", lease.order_id, lease.table_digest, scored(lease, **answer))
    assert train(b)


def test_five_deaths_at_the_same_order_stop_the_run_but_not_deaths_of_nodes(tmp_path: Path) -> None:
    b = buffer(tmp_path)
    start(b)
    for node in range(7):
        b.claim(f"s{node}")
        b.worker_died(f"s{node}", "nobody")
    for worker in range(5):
        assert b.stop is None
        assert b.claim(f"t{worker}")
        b.worker_died(f"t{worker}")
    with pytest.raises(RunStopped, match="5 workers died on the same work"):
        b.claim("s0")
    finish(buffer(tmp_path))


@pytest.mark.parametrize("charged", ["work", "device"])
def test_a_picture_that_kills_its_worker_is_found_and_set_aside(charged: Charged, tmp_path: Path) -> None:
    """Also one for which a worker's memory never suffices."""
    b = buffer(tmp_path, batches=1)
    start(b)
    roll_out(b)
    deaths = 0
    for worker in range(10):
        lease = b.lease("size", f"r{worker}")
        assert lease
        if 1 in lease.skip:
            break
        if lease.alone:
            b.trying_alone(f"r{worker}", 0)
            b.trying_alone(f"r{worker}", 1)
        b.worker_died(f"r{worker}", charged if lease.alone else "work")
        deaths += 1
    assert lease and b.add_scores("size", lease.order_id, lease.table_digest, scored(lease))
    assert deaths == 5 and b.stop is None
    finish(b)
    assert [row["set_aside"] is None for row in rows(tmp_path)[0]] == [True, False] + [True] * 6


def test_a_picture_tried_alone_on_hosts_that_are_lost_is_not_to_blame(tmp_path: Path) -> None:
    b = buffer(tmp_path, batches=1)
    start(b)
    roll_out(b)
    for worker in range(5):
        assert b.lease("size", f"r{worker}")
        b.trying_alone(f"r{worker}", 1)
        b.worker_died(f"r{worker}", "nobody")
    finish(b)
    assert b.news().set_aside == {}


def test_a_lease_ends_at_its_time_out_and_lasts_anew_for_each_picture_alone(tmp_path: Path) -> None:
    now = [0.0]
    b = buffer(tmp_path, clock=lambda: now[0])
    start(b)
    roll_out(b)
    assert b.lease("size", "slow")
    now[0] = 9.0
    assert b.overdue() == []
    b.trying_alone("slow", 0)
    now[0] = 18.0
    b.trying_alone("slow", 1)
    assert b.overdue() == []
    now[0] = 29.0
    assert b.overdue() == ["slow"]


# ---- training


def test_the_first_trained_counts_and_a_second_learner_hears_of_it(tmp_path: Path) -> None:
    b = buffer(tmp_path)
    start(b)
    make_orders(b, 4)
    first = b.take("l1")
    assert first and b.take("l2") is None
    b.worker_died("l1")
    second = b.take("l2")
    assert second and second.roster == first.roster and second.recovery_point != first.recovery_point
    v_second = written(b, second)
    v_first = written(b, first)
    assert b.trained(0, v_first, first.recovery_point, first.parquet) == first.recovery_point
    assert b.trained(0, v_second, second.recovery_point, second.parquet) == first.recovery_point
    assert b.trained(0, v_first, first.recovery_point, first.parquet) == first.recovery_point
    assert [path.name for path in (tmp_path / "trajectories").iterdir()] == [Path(first.parquet).name]
    assert b.current() == (v_first, first.recovery_point)


def test_a_batch_that_is_not_the_next_or_not_on_disk_is_refused(tmp_path: Path) -> None:
    b = buffer(tmp_path)
    start(b)
    make_orders(b, 4)
    taken = b.take("learner")
    assert taken
    with pytest.raises(Refused, match="is not there"):
        b.trained(0, Version(1, "x"), taken.recovery_point, taken.parquet)
    version = written(b, taken)
    with pytest.raises(Refused, match="comes version"):
        b.trained(0, Version(2, "x"), taken.recovery_point, taken.parquet)
    with pytest.raises(Refused, match="not what is to be trained"):
        b.trained(1, Version(2, "x"), taken.recovery_point, taken.parquet)
    # the rows change below the learner: its work is of a roster that is no more
    (tmp_path / file_of(b, "b00000.01", "latents")).write_bytes(b"")
    b.worker_died("learner")
    assert b.take("learner") is None
    with pytest.raises(Refused, match="not what is to be trained"):
        b.trained(0, version, taken.recovery_point, taken.parquet)
    finish(b)


def test_what_was_never_acknowledged_is_removed_at_the_next_start(tmp_path: Path) -> None:
    b = buffer(tmp_path)
    start(b)
    make_orders(b, 5)
    taken = b.take("learner")
    assert taken
    written(b, taken)
    theirs = ["checkpoints/my-notes.txt", "trajectories/own.parquet", "tensors/b1.txt"]
    theirs += [f"{b.state.trained[0].recovery_point}.bak", "trajectories/b00000.e0001.00001.parquet.old"]
    for path in theirs:
        (tmp_path / path).write_text("mine")
    (tmp_path / "tensors/b00001.03.latents.e0001.00099.arrow").write_bytes(b"torn")
    (tmp_path / "tensors/.b00001.02.image.e0001.00098.arrow.partial").write_bytes(b"to")
    (tmp_path / "checkpoints/.v00001.e0001.00097.tmp").mkdir()
    acknowledged = [file.path for work in b.state.work.values() for file in work.rollout or () if file]
    after = buffer(tmp_path)
    left = [
        f"{path.parent.name}/{path.name}"
        for f in ("tensors", "trajectories", "checkpoints")
        for path in (tmp_path / f).iterdir()
    ]
    scores = [s.file.path for work in after.state.work.values() for s in work.scores]
    assert sorted(left) == sorted([*theirs, *acknowledged, *scores, after.state.trained[0].recovery_point])
    finish(after)


def test_retention_keeps_what_the_rules_need_and_no_more(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"batches": 8, "max_staleness": 1, "keep_batches": 2, "keep_checkpoints": 1}
    b = buffer(tmp_path, **settings)
    start(b)
    while not b.finished:
        roll_out(b)
        score(b)
        if train(b):
            n = b.state.next_batch
            points = sorted(int(path.name[1:6]) for path in (tmp_path / "checkpoints").iterdir())
            assert points == list(range(max(n - 2, 0), n + 1))
            names = [path.name.split(".") for path in (tmp_path / "tensors").iterdir()]
            batches = {int(name[0][1:]) for name in names}
            assert min(batches, default=n) >= n - 2
            assert {n - 1, n - 2} & set(range(n)) <= batches
        publish(b)
    assert len(list((tmp_path / "trajectories").iterdir())) == 8


# ---- damage


@pytest.mark.parametrize("same", [True, False])
def test_a_damaged_table_is_rolled_out_again_at_its_version(tmp_path: Path, same: bool) -> None:
    """With the same result its scores stay; with another (other hardware) it is scored again. Either is said."""
    calm = tmp_path / "calm"
    finish(buffer(calm, max_staleness=0))
    run = tmp_path / "run"
    b = buffer(run, max_staleness=0)
    start(b)
    make_orders(b, 4)
    path = run / file_of(b, "b00000.02", "latents")
    path.write_bytes(path.read_bytes()[:-20])
    b = buffer(run, max_staleness=0)
    publish(b)
    assert b.take("learner") is None
    assert len(b.notes) == 1 and "b00000.02 is rolled out again" in b.notes[0]
    claim = b.claim("s0")
    assert claim and claim.order.order_id == "b00000.02" and claim.version == V0
    assert b.add(claim.order.order_id, V0, rolled_out(claim.order, V0, "" if same else "other device"))
    assert (b.lease("size", "r0") is None) == same
    b.worker_died("r0")
    finish(b)
    assert (rows(run) == rows(calm)) == same


def test_damage_is_noticed_when_pictures_are_leased_and_damaged_scores_are_made_again(tmp_path: Path) -> None:
    b = buffer(tmp_path)
    start(b)
    roll_out(b)
    (tmp_path / file_of(b, "b00000.00", "images")).unlink()
    assert b.lease("size", "r0") is None and len(b.notes) == 1
    make_orders(b, 4)
    (tmp_path / b.state.work["b00000.03"].scores[0].file.path).write_bytes(b"?")
    assert b.take("learner") is None
    assert "scored with size again" in b.notes[1]
    finish(b)


def fill_up_and_go_on(run: Path, mounted: bool) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    b = buffer(run, batches=100, keep_batches=100)
    start(b)
    while b.state.next_batch < 2:
        roll_out(b)
        score(b)
        train(b)
        publish(b)
    if mounted:  # full now, so that it is the buffer that meets it: a learner's stop is not the buffer's
        with pytest.raises(OSError), (run / "filler").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(512))
    else:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, limits[1]))
    with pytest.raises(RunStopped, match=f"The disk that holds {run}.* is full"):
        finish(b)
    acknowledged = restarted(b.state)
    with pytest.raises(RunStopped, match="is full"):
        b.claim("s0")
    assert b.stop and "is full" in b.stop
    if mounted:
        subprocess.run(["mount", "-o", "remount,size=30m", run], check=True)
    else:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    after = buffer(run, batches=acknowledged.next_batch + 2, keep_batches=100)
    assert restarted(after.state)._replace(epoch=1) == acknowledged
    finish(after)


def test_a_full_disk_stops_with_a_sentence_and_loses_nothing(tmp_path: Path) -> None:
    """In a process of its own: on a file system of 300 kB that only it sees, or, where none can be mounted, under a
    limit of the size of files."""
    run = tmp_path / "run"
    run.mkdir()
    mount = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=300k none "$0" && exec "$@"', str(run)]
    mounted = (
        shutil.which("unshare") is not None and subprocess.run([*mount, "true"], capture_output=True).returncode == 0
    )
    call = f"from tests.buffer.test_run import *; fill_up_and_go_on(Path({str(run)!r}), {mounted})"
    done = subprocess.run(
        [*(mount if mounted else []), sys.executable, "-c", call], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_a_journal_that_cannot_be_written_acknowledges_nothing(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    b = buffer(tmp_path)
    start(b)
    size = (tmp_path / "journal/epoch-000001.jsonl").stat().st_size
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, limits[1]))
        with pytest.raises(RunStopped, match="is full"):
            b.claim("s0")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with pytest.raises(RunStopped, match="is full"):
        b.claim("s0")
    assert not b.state.work and (tmp_path / "journal/epoch-000001.jsonl").stat().st_size == size
    finish(buffer(tmp_path))


# ---- evaluations


def test_evaluations_come_first_hold_nothing_up_and_are_the_same_pairs(tmp_path: Path) -> None:
    b = buffer(tmp_path, evaluate_versions=(0, 2, 3))
    start(b)
    claims = [b.claim(f"e{i}") for i in range(2)]
    assert [c and c.order.order_id for c in claims] == [
        "e00000.train.00",
        "e00000.train.01",
    ]  # and nobody rolls them out
    make_orders(b, 4)
    assert train(b)  # the batch did not wait
    publish(b)
    assert b.rules.kept(b.state) >= {0}
    b.worker_died("e0")
    b.worker_died("e1")
    finish(b)
    tables = evaluations(b)
    assert list(tables) == [0, 2, 3]
    pairs = [list(zip(t["prompt"].to_pylist(), t["seed"].to_pylist(), strict=True)) for t in tables.values()]
    assert pairs[0] == pairs[1] == pairs[2] and len(set(pairs[0])) == 4
    assert [t["policy_version"].to_pylist() for t in tables.values()] == [[v] * 4 for v in (0, 2, 3)]
    assert not {"batch", "age", "age_in_flight", "advantage"} & set(tables[0].column_names)
    images = b.evaluation(Evaluation(3, FIRST), 3)[1]
    first, second = PLAN.evaluation(Evaluation(3, FIRST))
    assert images is not None and list(images) == [*first.trajectory_ids, second.trajectory_ids[0]]
    made = tensors_of(rolled_out(first, b.state.trained[3].version))["image"]
    np.testing.assert_array_equal([images[id] for id in first.trajectory_ids], made)
    assert images[second.trajectory_ids[0]].shape == (4, 4, 3)
    assert b.evaluation(Evaluation(0, FIRST), 3)[1] is None  # retention: the last two are kept
    assert evaluations(buffer(tmp_path, evaluate_versions=(0, 2, 3))).keys() == tables.keys()


def test_each_set_has_pairs_and_rewards_of_its_own(tmp_path: Path) -> None:
    plan = replace(PLAN, sets=(*PLAN.sets, FixedSet("held_out", 6, ("an owl", "a bee"))))
    sets = {"train": SetRules((0, 3), ("size",)), "held_out": SetRules((0, 2, 3), ("taste", "size"))}
    sets_apart = {"sets": sets | {"held_out": SetRules((0, 3), ("taste",))}}
    for run, changed in ((tmp_path / "both", {"sets": sets}), (tmp_path / "apart", sets_apart)):
        b = buffer(run, plan, lease_timeouts={"size": 10.0, "taste": 10.0}, **changed)
        finish(b, ("size", "taste"))
        held_out = evaluations(b, "held_out")
        assert list(evaluations(b)) == [0, 3] and list(held_out) == list(b.rules.sets["held_out"].versions)
        alone, own = evaluations(b)[0], held_out[0]
        assert alone["seed"].to_pylist() == [seed for o in PLAN.evaluation(Evaluation(0, FIRST)) for seed in o.seeds]
        assert set(own["prompt"].to_pylist()) == {"an owl", "a bee"} and own["taste"].null_count == 0
        assert "taste" not in alone.column_names and alone["reward"].null_count == 0
        # the reward that is trained on, where the set has all its parts
        assert own["reward"].null_count == (0 if "size" in own.column_names else 6)
        tables = [*evaluations(b).values(), *held_out.values()]
        ids = [id for table in tables for id in table["trajectory_id"].to_pylist()]
        assert len(ids) == len(set(ids)) and max(ids) < 0
        assert "taste" not in pq.read_schema(min((run / "trajectories").iterdir())).names  # nobody trains on it


def test_pictures_of_an_evaluation_go_by_their_ids_whatever_was_set_aside(tmp_path: Path) -> None:
    b = buffer(tmp_path, evaluate_versions=(0,), max_failed_share=1.0)
    start(b)
    first, second = PLAN.evaluation(Evaluation(0, FIRST))
    for worker in ("s0", "s1"):
        claim = b.claim(worker)
        assert claim and b.add(claim.order.order_id, claim.version, rolled_out(claim.order, claim.version))
    broken = first.trajectory_ids[0]
    while (lease := b.lease("size", "r0")) is not None:
        if broken in lease.table["trajectory_id"].to_pylist() and broken not in lease.skip:
            b.pictures_failed("size", lease.order_id, lease.table_digest, "r0", {broken: "no animal"})
        else:
            assert b.add_scores("size", lease.order_id, lease.table_digest, scored(lease))
    assert list(evaluations(b)) == [0]
    rows = evaluations(b)[0]
    images = b.evaluation(Evaluation(0, FIRST), 3)[1]
    assert images is not None and list(images) == [first.trajectory_ids[1], second.trajectory_ids[0]]
    assert rows["trajectory_id"].to_pylist() == [*first.trajectory_ids, *second.trajectory_ids]
    assert rows["set_aside"].null_count == 3 and "no animal" in rows["set_aside"][0].as_py()


def test_an_evaluation_that_cannot_be_served_is_missed(tmp_path: Path) -> None:
    finish(buffer(tmp_path, evaluate_versions=(3,)))
    b = buffer(tmp_path, evaluate_versions=(0, 3), batches=4)  # version 0 is gone by now
    assert missed(b) == [0] and "missed" in b.notes[0]
    finish(b)
    assert list(evaluations(b)) == [3]
    assert buffer(tmp_path, evaluate_versions=(0, 3), batches=4).finished


def test_an_evaluation_that_was_begun_and_is_not_due_any_more_is_missed(tmp_path: Path) -> None:
    """The last version is evaluated always; if run.batches is raised, it is not the last."""
    b = buffer(tmp_path, evaluate_versions=(1,), batches=1, max_staleness=0)
    start(b)
    while train(b) is None:
        assert roll_out(b) and score(b)
    publish(b)
    assert roll_out(b) and not b.finished
    b = buffer(tmp_path, evaluate_versions=(3,), batches=3, max_staleness=0)
    assert missed(b) == [1] and "not due any more" in b.notes[0]
    assert not list((tmp_path / "tensors").glob("e00001*"))
    finish(b)
    assert list(evaluations(b)) == [3]


def test_what_was_set_aside_stays_counted_when_its_evaluation_is_old(tmp_path: Path) -> None:
    versions = range(6)
    b = buffer(tmp_path, batches=5, max_staleness=0, evaluate_versions=versions)
    counts = []
    for _ in versions:
        start(b)
        fail_everything(b, orders=1)
        while roll_out(b) or score(b):
            pass
        train(b)
        counts.append(sum(b.news().set_aside.values()))
    assert counts == [2 * (version + 1) for version in versions]
    assert sum(buffer(tmp_path, batches=5, max_staleness=0, evaluate_versions=versions).news().set_aside.values()) == 12


def test_an_evaluation_shows_what_there_is_and_stops_nothing(tmp_path: Path) -> None:
    """Half of its pictures fail, far above max_failed_share, and training does not hear of it."""
    b = buffer(tmp_path, evaluate_versions=(0, 3))
    start(b)
    fail_everything(b, orders=1)
    assert b.stop is None
    finish(b)
    assert evaluations(b)[0]["reward"].null_count == 2 and evaluations(b)[3]["reward"].null_count == 0


def test_an_evaluation_that_comes_to_nothing_is_left_for_the_next_start(tmp_path: Path) -> None:
    b = buffer(tmp_path, evaluate_versions=(0, 3))
    start(b)
    fail_everything(b, orders=2)
    assert b.stop is None and "left for the next start" in b.notes[0] and "no such model" in b.notes[0]
    make_orders(b, 4)
    assert train(b)  # the batch did not wait
    mended = buffer(tmp_path, evaluate_versions=(0, 3))
    finish(mended)
    assert evaluations(mended)[0]["reward"].null_count == 0


def test_an_evaluation_that_comes_to_nothing_is_missed_at_the_end(tmp_path: Path) -> None:
    b = buffer(tmp_path, evaluate_versions=(3,))
    finish(buffer(tmp_path, evaluate_versions=()))
    b = buffer(tmp_path, evaluate_versions=(3,))
    start(b)
    fail_everything(b, orders=2)
    assert b.finished and missed(b) == [3]


def test_deaths_at_an_evaluation_stop_nothing(tmp_path: Path) -> None:
    b = buffer(tmp_path, evaluate_versions=(0, 3))
    start(b)
    for worker in range(5):
        claim = b.claim(f"s{worker}")
        assert claim and claim.order.order_id == "e00000.train.00"
        b.worker_died(f"s{worker}")
    assert b.stop is None and "5 workers died on its order e00000.train.00" in b.notes[0]
    claim = b.claim("s9")
    assert claim and claim.order.order_id == "e00000.train.01"
    b.worker_died("s9")
    finish(b)
    assert missed(b) == [0] and 3 in evaluations(b)


@pytest.mark.parametrize("k", [0, 1, 2])
def test_an_evaluation_is_scored_though_the_reward_always_has_more_to_do(k: int, tmp_path: Path) -> None:
    """Samplers are always ahead, and the reward scores one order after the other: batches, and evaluations in turn."""
    b = buffer(tmp_path, max_staleness=k, batches=8, evaluate_versions=tuple(range(8)))
    start(b)
    while b.state.next_batch < 8:
        while roll_out(b):
            pass
        score(b)
        train(b)
        publish(b)
        assert len(evaluations(b)) >= b.state.next_batch - k - 1, "evaluations starve"


# ---- epochs


def test_a_cut_off_buffer_spoils_nothing(tmp_path: Path) -> None:
    """It deletes nothing that the later epoch needs, its calls stop, and the run finishes as if it were not there."""
    old = buffer(tmp_path)
    start(old)
    for _ in range(6):
        roll_out(old)
        score(old)
    taken = old.take("learner")
    assert taken
    version = written(old, taken)
    claim = old.claim("s9")
    assert claim
    new = buffer(tmp_path)
    files = tree(tmp_path)
    with pytest.raises((RunStopped, Refused)):
        old.trained(taken.batch, version, taken.recovery_point, taken.parquet)
    with pytest.raises(RunStopped, match="Another driver"):
        old.add(claim.order.order_id, claim.version, rolled_out(claim.order, claim.version))
    with pytest.raises(RunStopped, match="Another driver"):
        old.claim("s9")
    left = tree(tmp_path)
    assert files.items() <= left.items()
    start(new)
    assert new.add(claim.order.order_id, claim.version, rolled_out(claim.order, claim.version))  # bound, so it counts
    finish(new)
    assert [row["trajectory_id"] for batch in rows(tmp_path).values() for row in batch] == list(
        range(3 * PLAN.batch_size)
    )


def test_a_cut_off_buffer_deletes_nothing_once_it_can_see_the_later_epoch(tmp_path: Path) -> None:
    """The two cannot see each other for a while (a cable, a file system's cache), and train the same batch."""
    old = buffer(tmp_path)
    start(old)
    for _ in range(4):
        roll_out(old)
        score(old)
    new = buffer(tmp_path)
    journal = tmp_path / "journal/epoch-000002.jsonl"
    unseen = journal.rename(tmp_path / "unseen")
    theirs = train(old, "old learner")
    unseen.rename(journal)
    publish(new)
    ours = train(new)
    current = old.current()
    assert ours and theirs and current and current != new.current()
    before = tree(tmp_path)
    assert old.trained(0, current[0], theirs.recovery_point, theirs.parquet) == theirs.recovery_point
    assert tree(tmp_path) == before
    finish(new)
    del old
    assert buffer(tmp_path).state.trained == new.state.trained
    assert [path.name for path in (tmp_path / "trajectories").glob("b00000.*")] == [Path(ours.parquet).name]


def test_a_killed_process_loses_nothing_that_it_was_told(tmp_path: Path) -> None:
    """kill -9 at a random moment, seen from the outside: what the process had printed is there afterwards."""
    script = (
        "import sys, pathlib; from tests.buffer_toy import *\n"
        "b = buffer(pathlib.Path(sys.argv[1]), batches=1000, max_staleness=1); start(b)\n"
        "while True:\n"
        "    c = roll_out(b); print('table', c.order.order_id if c else '', flush=True)\n"
        "    score(b); t = train(b); publish(b)\n"
        "    print('trained', b.current()[0].number, flush=True)\n"
    )
    for lines in (3, 17, 40):
        process = subprocess.Popen(
            [sys.executable, "-c", script, tmp_path], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        told = [next(process.stdout).split() for _ in range(lines)]
        process.kill()
        told += [line.split() for line in process.stdout]
        process.wait()
        b = buffer(tmp_path, batches=1000)
        assert b.state.next_batch >= max(int(words[1]) for words in told if words[0] == "trained")
        for words in told:
            if words[0] == "table" and len(words) == 2 and parse(words[1]).group >= b.state.next_batch:
                assert b.state.work[words[1]].rollout is not None
        b.close()
