"""A toy run for the buffer's tests: tiny tables, a learner whose weights are a digest, a clock that is set."""

import hashlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from buffer.buffer import TrajectoryBuffer
from buffer.orders import FixedSet, Order, Plan, Version
from buffer.protocol import Claim, Lease, TakenBatch
from buffer.rows import Combination
from buffer.rules import Rules, SetRules
from buffer.schema import rollout_table
from buffer.store import write_batch

PROMPTS = ("a cat", "a dog", "a bee")
TRAIN = FixedSet("train", 4, PROMPTS)
PLAN = Plan(seed=7, prompts=PROMPTS, batch_size=8, order_size=2, sets=(TRAIN,))
V0 = Version(0, "weights-0")
ONE_REWARD = Combination({"size": 1.0})


def buffer(run_dir: Path, plan: Plan = PLAN, **changed: Any) -> TrajectoryBuffer:
    """changed: fields of `Rules`, "evaluate_versions" of the one set, "combination" or "clock"."""
    combination = changed.pop("combination", ONE_REWARD)
    clock = changed.pop("clock", lambda: 1000.0)
    return TrajectoryBuffer(run_dir, plan, rules(plan, combination, **changed), combination, clock)


def rules(plan: Plan = PLAN, combination: Combination = ONE_REWARD, **changed: Any) -> Rules:
    rewards = tuple(combination.weights)
    settings: dict[str, Any] = {
        "batches": 3,
        "max_staleness": 1,
        "keep_batches": 1,
        "keep_checkpoints": 0,
        "claim_timeout_s": 10.0,
        "lease_timeouts": dict.fromkeys(combination.weights, 10.0),
        "train_timeout_s": 100.0,
        "max_failed_share": 0.25,
        "sets": {"train": SetRules(changed.pop("evaluate_versions", ()), rewards)},
    }
    return Rules(sizes=plan.sizes, rewards=rewards, **settings | changed)


def rolled_out(order: Order, version: Version, device: str = "", shape: tuple[int, ...] = (2, 3, 3)) -> pa.Table:
    """A rollout: a function of the order's seeds, the weights and the device, as a real one is."""
    noise = int.from_bytes(hashlib.sha256(f"{version}{device}".encode()).digest()[:4], "big")
    n, steps = len(order.seeds), 2
    rng = np.random.default_rng([noise, *order.seeds])
    path = {
        "latents": rng.standard_normal((n, steps + 1, *shape), np.float32),
        "timesteps": np.tile(np.arange(steps, 0, -1, dtype=np.int32), (n, 1)),
        "log_probs": rng.standard_normal((n, steps), np.float32),
    }
    return rollout_table(order, rng.integers(0, 255, (n, 4, 4, 3), np.uint8), {} if order.evaluation else path)


def scored(lease: Lease, **columns: list[Any]) -> pa.Table:
    """The mean brightness of each picture that is not to be skipped."""
    ids = lease.table["trajectory_id"].to_pylist()
    images = lease.table["image"].combine_chunks().to_numpy_ndarray()
    rows = [i for i, trajectory_id in enumerate(ids) if trajectory_id not in lease.skip]
    table = {"trajectory_id": pa.array([ids[i] for i in rows], pa.int64())}
    table["score"] = pa.array([float(images[i].mean()) for i in rows], pa.float32())
    return pa.table(table | {name: pa.array(values) for name, values in columns.items()})


def start(b: TrajectoryBuffer) -> None:
    """Version 0 is registered, and everything due is published."""
    if b.current() is None:
        path = b.initial_recovery_point()
        write_weights(b.run_dir / path, V0)
        b.trained(-1, V0, path, "")
    publish(b)


def write_weights(recovery_point: Path, version: Version) -> None:
    recovery_point.mkdir()
    (recovery_point / "weights").write_text(version.digest)


def publish(b: TrajectoryBuffer) -> None:
    for version, path in b.to_publish():
        assert (b.run_dir / path / "weights").read_text() == version.digest
        b.publish(version, version.digest)


def roll_out(b: TrajectoryBuffer, worker: str = "s0") -> Claim | None:
    claim = b.claim(worker)
    if claim is not None:
        assert b.add(claim.order.order_id, claim.version, rolled_out(claim.order, claim.version))
    return claim


def score(b: TrajectoryBuffer, reward: str = "size", worker: str = "r0") -> Lease | None:
    lease = b.lease(reward, worker)
    if lease is not None:
        assert b.add_scores(reward, lease.order_id, lease.table_digest, scored(lease))
    return lease


def written(b: TrajectoryBuffer, taken: TakenBatch) -> Version:
    """What a learner leaves before it calls `trained`; the new weights follow from the old ones and the rows."""
    advantages = taken.table["reward"].to_numpy() - taken.table["reward"].to_numpy().mean()
    write_batch(b.run_dir, taken, advantages.astype(np.float32), time.time())
    digest = hashlib.sha256(f"{taken.version}{taken.table['reward'].to_pylist()}".encode()).hexdigest()[:16]
    version = Version(taken.batch + 1, digest)
    write_weights(b.run_dir / taken.recovery_point, version)
    return version


def train(b: TrajectoryBuffer, learner: str = "learner") -> TakenBatch | None:
    taken = b.take(learner)
    if taken is not None:
        version = written(b, taken)
        assert b.trained(taken.batch, version, taken.recovery_point, taken.parquet) == taken.recovery_point
    return taken


def finish(b: TrajectoryBuffer, rewards: Sequence[str] = ()) -> None:
    """A run without faults, to its end. rewards: all that there are, if more than those that are trained on."""
    start(b)
    for _ in range(1000):
        if b.finished:
            return
        moved = [roll_out(b), *[score(b, reward) for reward in rewards or b.combination.weights], train(b)]
        publish(b)
        assert any(moved) or b.finished, b.news()
    raise AssertionError("the run does not end")


def evaluations(b: TrajectoryBuffer, name: str = "train") -> dict[int, pa.Table]:
    """Rows of a set's finished evaluations by version."""
    finished = [each for each, rows in sorted(b.state.evaluations.items()) if rows and each.set == name]
    return {each.version: b.evaluation(each, 0)[0] for each in finished}


def missed(b: TrajectoryBuffer) -> list[int]:
    """Versions whose evaluation was missed."""
    return [evaluation.version for evaluation, rows in b.state.evaluations.items() if rows is None]
