"""TrajectoryBuffer: the state machine with its journal and its files. The buffer actor only forwards to it.

                       claim()                       lease(reward)
        sampler  <───────────── ┌────────────────┐ ─────────────────►  reward worker
                  order,version │ TrajectoryBuffer│  prompts, images, ids
                 ─────────────► │ orders, tables │ ◄─────────────────
                     add(table) │    journal     │   add_scores(table)
                                └──────┬─────────┘
                         take(batch u) │ ▲ trained(u) -> the driver publishes version u+1
                                       ▼ │
                                    learner

Every call is one pure transition, journaled before it is answered (ledger.py). Calls come one at a time. A call that
does not count answers False or None, or raises `Refused`; `RunStopped` ends the run.
"""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from buffer import transitions, watching
from buffer.ledger import Ledger, excusing_delays
from buffer.orders import Evaluation, Plan, Version
from buffer.protocol import Charged, Claim, Lease, News, Refused, TakenBatch
from buffer.rows import Assembly, Combination, first_pictures
from buffer.rules import Rules
from buffer.schema import ScoreTypes, check_rollout, check_scores, stack
from buffer.state import File, Rollout, State, Step, Trained, work_of
from buffer.store import roster_of
from common.blame import writable
from common.errors import RunStopped


class TrajectoryBuffer:
    """One epoch of a run's buffer. Making it takes the next epoch of the run folder, and goes on from its journal.

    combination: how the rules' rewards become one. clock: seconds since 1970. Raises UserError if the journal is of
    another plan or damaged, and then leaves the folder untouched.
    """

    def __init__(
        self, run_dir: Path, plan: Plan, rules: Rules, combination: Combination, clock: Callable[[], float] = time.time
    ) -> None:
        self.run_dir = run_dir
        self.plan = plan
        self.rules = rules
        self.combination = combination
        self.clock = clock
        self._weights: dict[Version, Any] = {}  # what each published version was published with
        self.lr_halvings = 0
        self._types = ScoreTypes()
        self._ledger = Ledger(run_dir, plan, clock)
        self.epoch = self._ledger.epoch
        self._open()

    @property
    def state(self) -> State:
        return self._ledger.state

    @property
    def notes(self) -> list[str]:
        """What was damaged, removed or missed in this epoch, in sentences."""
        return self._ledger.notes

    # ---- samplers

    def prompts(self) -> tuple[str, ...]:
        """All that orders may ask for."""
        return self.plan.all_prompts

    @excusing_delays
    def claim(self, worker: str) -> Claim | None:
        """An order to roll out, or None if nothing may be claimed now."""
        self._stop_if_due()
        answer = self._do(transitions.claim, worker)
        if answer is None:
            return None
        order_id, version = answer
        return Claim(self.plan.order(order_id), version, self._weights[version])

    @excusing_delays
    def add(self, order_id: str, version: Version, table: pa.Table) -> bool:
        """Take in an order's trajectories (`schema.rollout_table`). True: they count, and are on disk. False: the
        buffer has the order already, or these weights are not the ones it is bound to. Anybody may call."""
        version = Version(*version)
        if not transitions.accepts(self.rules, self.state, order_id, version):
            return False
        check_rollout(self.plan.order(order_id), table)
        path = table.drop_columns("image")
        latents = self._ledger.write(f"{order_id}.latents", path) if path.num_columns > 1 else None
        images = self._ledger.write(f"{order_id}.image", table.select(["trajectory_id", "image"]))
        return bool(self._do(transitions.add, order_id, version, Rollout(images, latents)))

    @excusing_delays
    def order_failed(self, order_id: str, worker: str, message: str) -> None:
        """The rollout raised: the third time, its pictures are set aside. Only the holder of a claim is heard."""
        self._do(transitions.order_failed, order_id, worker, writable(message))
        self._finish_evaluations()

    # ---- reward workers

    @excusing_delays
    def lease(self, reward: str, worker: str) -> Lease | None:
        """Pictures to score, or None if there are none now."""
        self._stop_if_due()
        while True:
            step = transitions.lease(self.rules, self.state, reward, worker, self.clock())
            if step.answer is None:
                return None
            order_id, file, skip, alone = step.answer
            table = self._read(order_id, file)
            if table is not None:
                self._ledger.do(step)
                prompts = pa.array(self.plan.order(order_id).prompts, pa.string())
                shown = table.select(["trajectory_id", "image"]).add_column(1, "prompt", prompts)
                return Lease(order_id, file.digest, shown, skip, alone)

    @excusing_delays
    def add_scores(self, reward: str, order_id: str, table_digest: str, table: pa.Table) -> bool:
        """Take in scores: trajectory_id int64, score float32 (finite), further columns to store. True: they count.
        Raises ValueError if a picture that is not set aside has no score."""
        if not transitions.scores_wanted(self.rules, self.state, reward, order_id, table_digest):
            return False
        skip = [trajectory_id for trajectory_id, _ in work_of(self.state, order_id).set_aside]
        check_scores(self.plan.order(order_id), table, skip)
        with self._ledger.remembering_a_stop():
            self._types.check(reward, table.schema)
        file = self._ledger.write(f"{order_id}.{reward}", table)
        counts = bool(self._do(transitions.add_scores, reward, order_id, table_digest, file))
        self._finish_evaluations()
        return counts

    @excusing_delays
    def pictures_failed(
        self, reward: str, order_id: str, table_digest: str, worker: str, reasons: Mapping[int, str]
    ) -> None:
        """These pictures raised when tried alone: the third time, one is set aside. The lease is over, and the order is
        offered again for the others. Only the holder of a lease is heard."""
        reasons = {trajectory_id: writable(reason) for trajectory_id, reason in reasons.items()}
        self._do(transitions.pictures_failed, reward, order_id, table_digest, worker, reasons)
        self._finish_evaluations()

    def trying_alone(self, worker: str, trajectory_id: int | None) -> None:
        """Say which single picture is tried next (None: none any more): a death then counts against the picture."""
        self._do(transitions.trying_alone, worker, trajectory_id)

    # ---- the fleet

    @excusing_delays
    def worker_died(self, worker: str, charged: Charged = "work") -> None:
        """Claims, leases and the batch of a sampler, reward worker or learner go back."""
        self._do(transitions.worker_died, worker, charged)
        self._finish_evaluations()

    def overdue(self) -> list[str]:
        """Workers to be killed: they outlived the time-out of a lease, or twice that of a claim."""
        return transitions.overdue(self.rules, self.state, self.clock())

    # ---- learner and driver

    @excusing_delays
    def take(self, learner: str) -> TakenBatch | None:
        """The batch to train now, or None. `learner` names the whole group; asking again gives the batch again."""
        self._stop_if_due()
        step = transitions.take(self.rules, self.state, learner, self.clock())
        if step.answer is None:
            return None
        live, aside = self._rows(self.rules.sizes.batch_orders(step.answer), tensors=True)
        if live is None:
            return None  # something was damaged, and is made again
        self._ledger.do(step)
        batch, name = step.answer, self._ledger.store.new_name("")[1:]
        version, roster = self.state.trained[-1].version, self.state.rosters[batch]
        return TakenBatch(batch, version, roster, name, live, aside, self.lr_halvings)

    def slow(self, lr_halvings: int) -> None:
        """Batches from now on are trained with a learning rate that was halved so often. An epoch begins with none."""
        self.lr_halvings = max(self.lr_halvings, lr_halvings)

    def initial_recovery_point(self) -> str:
        """A new name for version 0's recovery point, relative to the run folder."""
        return f"checkpoints/{self._ledger.store.new_name('v00000')}"

    @excusing_delays
    def trained(self, batch: int, version_after: Version, recovery_point: str, parquet: str) -> str:
        """Both files are written. Returns the recovery point that counts: of another, the learner reloads it.

        batch -1 with an empty `parquet` registers version 0. Raises Refused if this is not the batch to train, or the
        Parquet file is not of the rows that were frozen.
        """
        version = Version(*version_after)
        known = batch < self.state.next_batch
        roster = ""
        if not known:
            missing = [path for path in (recovery_point, parquet) if path and not (self.run_dir / path).exists()]
            if missing:
                raise Refused(f"{missing[0]} is not there; write it before calling trained.")
            roster = roster_of(self.run_dir / parquet) if parquet else ""
        offered = Trained(version, recovery_point, parquet, roster)
        counts = self._do(transitions.trained, batch, offered)
        self._ledger.remove(self._ledger.store.beside(counts))
        if not known:
            self._ledger.remove(self._unneeded(["tensors"]) + self.rules.old_recovery_points(self.state))
            self._finish_evaluations()
        return str(counts.recovery_point)

    def publish(self, version: Version, weights: Any) -> None:
        """Samplers find the weights of this version by `weights`, which every claim of it hands on (in this epoch)."""
        version = Version(*version)
        self._ledger.do(transitions.publish(self.rules, self.state, version))
        served = self.served()
        self._weights = {known: by for known, by in {**self._weights, version: weights}.items() if known in served}

    def to_publish(self) -> list[tuple[Version, str]]:
        """Versions that orders may ask for and that this epoch has not published yet, with their recovery points."""
        wanted = sorted(self.rules.served(self.state) - self.state.published) if self.state.trained else []
        return [(self.state.trained[v].version, self.state.trained[v].recovery_point) for v in wanted]

    def served(self) -> list[Version]:
        """Versions that orders may still ask for; the driver may let go of all other weights."""
        wanted = sorted(self.rules.served(self.state)) if self.state.trained else []
        return [self.state.trained[v].version for v in wanted]

    def current(self) -> tuple[Version, str] | None:
        """The newest version and its recovery point; None before version 0 is registered."""
        newest = self.state.trained[-1:]
        return (newest[0].version, newest[0].recovery_point) if newest else None

    # ---- evaluations

    @excusing_delays
    def evaluation(self, evaluation: Evaluation, pictures: int) -> tuple[pa.Table, dict[int, np.ndarray] | None]:
        """Rows of a finished evaluation, scalars as in trajectories/ but for the batch's; and its first pictures, see
        `first_pictures`."""
        evaluation = Evaluation(*evaluation)
        parquet = self.state.evaluations[evaluation]
        assert parquet is not None, "it was missed"
        rows = pq.read_table(self.run_dir / parquet)
        return rows, first_pictures(self._ledger.store.read_arrow, self.rules.sizes, self.state, evaluation, pictures)

    @excusing_delays
    def evaluation_missed(self, version: int, why: str) -> None:
        """Close what is still to be evaluated at a version, which can no longer be served (its recovery point does not
        load)."""
        for evaluation in self.rules.open_evaluations(self.state):
            if evaluation.version == version:
                self._miss(evaluation, why)

    def _miss(self, evaluation: Evaluation, why: str) -> None:
        self._ledger.note(f"The evaluation of version {evaluation.version} on {evaluation.set} was missed: {why}.")
        self._do(transitions.missed, evaluation, why)
        self._ledger.remove(self._unneeded(["tensors"]))

    # ---- watching

    @property
    def finished(self) -> bool:
        return self.rules.finished(self.state)

    @property
    def stop(self) -> str | None:
        """Why the run cannot go on, in a sentence; None if it can."""
        return self._ledger.stopped or self.rules.stop(self.state)

    def news(self) -> News:
        return News(
            epoch=self.epoch,
            stop=self.stop,
            to_publish=self.to_publish(),
            served=self.served(),
            evaluations=[each for each, parquet in self.state.evaluations.items() if parquet is not None],
            overdue=self.overdue(),
            **watching.progress(self.rules, self.state),
            notes=list(self.notes),
            seconds={},
            draining=False,
            lr_halvings=self.lr_halvings,
        )

    def close(self) -> None:
        self._ledger.close()

    # ---- the machinery

    def _do(self, transition: Callable[..., Step], *call: Any) -> Any:
        return self._ledger.do(transition(self.rules, self.state, *call, self.clock()))

    def _stop_if_due(self) -> None:
        if self.stop is not None:
            raise RunStopped(self.stop)

    def _open(self) -> None:
        self._ledger.do(transitions.reopen(self.rules, self.state))
        due = self.rules.open_evaluations(self.state)
        for evaluation in self.rules.begun(self.state):
            if evaluation not in due:
                self._miss(evaluation, "it was begun, and is not due any more")
        for evaluation in due:
            if not (self.run_dir / self.state.trained[evaluation.version].recovery_point).exists():
                self._miss(evaluation, "its recovery point is gone")
        self._ledger.remove(self._unneeded(["tensors", "trajectories", "evaluation", "checkpoints"]))
        self._finish_evaluations()

    def _unneeded(self, folders: list[str]) -> list[str]:
        return self._ledger.store.leftovers(self.rules.needed_files(self.state), folders)

    def _read(self, order_id: str, file: File, reward: str | None = None) -> pa.Table | None:
        """An acknowledged table; if it is damaged, it is journaled as to be made again, and said so."""
        table = self._ledger.read(file)
        if table is None:
            self._make_again(order_id, reward, file, "is damaged or gone")
        return table

    def _make_again(self, order_id: str, reward: str | None, file: File, why: str) -> None:
        what = f"scored with {reward}" if reward else "rolled out"
        self._ledger.note(f"{file.path} {why}: order {order_id} is {what} again.")
        self._do(transitions.damaged, order_id, reward, file.path)

    def _rows(self, orders: tuple[str, ...], tensors: bool) -> tuple[pa.Table | None, pa.Table]:
        """(rows that take part, rows set aside) of some orders, sorted; None for the first if anything is damaged."""
        rows = Assembly(self.plan, self.rules, self.combination, self.state, self._read, self._make_again)
        return rows.rows(orders, tensors)

    def _finish_evaluations(self) -> None:
        """Write the Parquet file of each evaluation that is over, then journal it. One that comes to nothing stays open
        for the next start to try again, and is missed when all else is done."""
        for evaluation in self.rules.open_evaluations(self.state):
            orders = self.rules.sizes.evaluation_orders(evaluation)
            if why := self.rules.hopeless(self.state, evaluation):
                if self.state.next_batch >= self.rules.batches:
                    self._miss(evaluation, why)
                    continue
                what = f"version {evaluation.version} on {evaluation.set}"
                self._ledger.note(f"The evaluation of {what} is left for the next start: {why}.")
            if not self.rules.all_over(self.state, orders) or why:
                continue
            live, aside = self._rows(orders, tensors=False)
            if live is not None:
                rows = stack([live, aside]).drop_columns(["batch", "age", "age_in_flight"])
                rows = rows.sort_by([("trajectory_id", "descending")])
                with self._ledger.remembering_a_stop():
                    path = self._ledger.store.write_evaluation(evaluation, rows)
                self._do(transitions.evaluated, evaluation, path)
                self._ledger.remove(self._unneeded(["tensors"]))
