"""The rules of the buffer, one small method each: decisions about a state, which change nothing.

Numbers in brackets are those of docs/buffer.md, which has the rules with their reasons. Every method is a rule that the
exhaustive search in tests/buffer/test_protocol_search.py can take out, to see the run go wrong without it.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from buffer.orders import Evaluation, Sizes, Version, parse
from buffer.state import Hold, Score, State, Trained, Work, place_of, work_of

FAILURES = 3  # of its own, and a picture or an order is set aside [7]
DEATHS = 5  # of workers at the same piece of work, and the run stops [7]
ALONE_AFTER = 2  # deaths at scoring an order, and its pictures are tried one by one, to find the one that kills
EVALUATIONS_KEPT = 2  # finished evaluations whose tensors are kept, for the grid of pictures


class SetRules(NamedTuple):
    """Of an evaluation set."""

    versions: tuple[int, ...]  # to be evaluated
    rewards: tuple[str, ...]


@dataclass(frozen=True)
class Rules:
    sizes: Sizes
    rewards: tuple[str, ...]
    batches: int
    max_staleness: int = 0  # k
    keep_batches: int = 2
    keep_checkpoints: int = 2
    claim_timeout_s: float = 600.0
    lease_timeouts: dict[str, float] = field(default_factory=dict)  # reward -> seconds
    train_timeout_s: float = 3600.0
    max_failed_share: float = 0.1
    sets: Mapping[str, SetRules] = field(default_factory=dict)

    def rewards_of(self, order_id: str) -> tuple[str, ...]:
        """Which rewards an order wants."""
        evaluation = parse(order_id).evaluation
        return self.sets[evaluation.set].rewards if evaluation else self.rewards

    # ---- rollouts

    def admitted(self, state: State, batch: int) -> bool:
        """[1] A batch may be claimed once version batch - k is published."""
        return batch < self.batches and max(state.published, default=-1) >= max(batch - self.max_staleness, 0)

    def binding(self, state: State, order_id: str) -> Version | None:
        """[1] The version that a claim of this order is answered with; None if it is not published yet.

        The bound one; at the first claim the newest published, or the one that an evaluation asks for.
        """
        bound = work_of(state, order_id).version
        name = parse(order_id)
        if bound is not None:
            number = bound.number
        elif name.evaluation:
            number = name.group
        else:
            number = max(state.published, default=-1)
        return state.trained[number].version if number in state.published else None

    def claimable(self, state: State) -> Iterator[str]:
        """Orders that are there to be rolled out, evaluations first, then batch by batch."""
        for evaluation in self.open_evaluations(state):
            yield from (o for o in self.sizes.evaluation_orders(evaluation) if self.to_roll_out(state, o))
        for batch in range(max(state.next_batch, 0), self.batches):
            if not self.admitted(state, batch):
                return
            yield from (o for o in self.sizes.batch_orders(batch) if self.to_roll_out(state, o))

    def to_roll_out(self, state: State, order_id: str) -> bool:
        work = work_of(state, order_id)
        return work.rollout is None and len(work.set_aside) < self.sizes.order_size and not self.rests(state, order_id)

    def rests(self, state: State, order_id: str) -> bool:
        """[7] An evaluation's order that costs worker after worker is left alone until the next start."""
        return parse(order_id).evaluation is not None and any(
            work == order_id and deaths >= DEATHS for (work, _), deaths in state.deaths.items()
        )

    def held(self, holds: tuple[Hold, ...], worker: str) -> bool:
        """[5] Who has this work and asks again did not hear the answer, and hears it again."""
        return any(hold.worker == worker for hold in holds)

    def offered(self, holds: tuple[Hold, ...], timeout: float, now: float) -> bool:
        """[5] Free work, or work whose one holder outlived its time-out."""
        return not holds or (len(holds) == 1 and now - holds[0].since > timeout)

    def spares(self, state: State, work: Work, reward: str, worker: str, now: float) -> bool:
        """[7] Work that failed at a worker's place goes to other places, as long as one is at work where it did not."""
        failed = {place for (role, _), places in work.failures if role == reward for place in places}
        return place_of(worker) in failed and bool(self._others(state, reward, failed, now))

    def overdue(self, holds: tuple[Hold, ...], limit: float, now: float) -> list[str]:
        """[5] Who is to be killed."""
        return [hold.worker for hold in holds if now - hold.since > limit]

    def counts(self, work: Work, version: Version) -> bool:
        """[3] A table counts if it is of the bound version and digest, and the first; whoever brings it."""
        return work.version == version and work.rollout is None and len(work.set_aside) < self.sizes.order_size

    # ---- scoring

    def scores_count(self, work: Work, table_digest: str) -> bool:
        """[4] Scores are of one table of pictures, and another table's are refused."""
        return work.rollout is not None and work.rollout.images.digest == table_digest

    def score_of(self, work: Work, reward: str) -> Score | None:
        """[4] The reward's scores of the present pictures; those of others wait to be replaced."""
        for score in work.scores:
            if score.reward == reward and work.rollout is not None and score.images == work.rollout.images.digest:
                return score
        return None

    def to_score(self, state: State, order_id: str, reward: str) -> bool:
        work = work_of(state, order_id)
        return (
            work.rollout is not None
            and reward in self.rewards_of(order_id)
            and self.score_of(work, reward) is None
            and len(work.set_aside) < self.sizes.order_size
            and not self.closed(state, order_id)
            and not self.rests(state, order_id)
        )

    def leasable(self, state: State, reward: str) -> Iterator[str]:
        """Orders that this reward has to score: the batches in order, and each evaluation in its turn."""
        names = sorted(state.work, key=self._turn)
        return (order_id for order_id in names if self.to_score(state, order_id, reward))

    def _turn(self, order_id: str) -> tuple[int, bool, str]:
        """Batches up to v + k may be under way when version v comes; its evaluation waits for those and no others, or a
        reward with more to do than it can would never come to it."""
        evaluation, group, _ = parse(order_id)
        return (group + self.max_staleness if evaluation else group), evaluation is not None, order_id

    def closed(self, state: State, order_id: str) -> bool:
        """Whether nothing about this order can change any more: its batch or evaluation is over."""
        evaluation, group, _ = parse(order_id)
        return evaluation in state.evaluations if evaluation else group < state.next_batch

    def is_set_aside(self, state: State, reward: str, places: tuple[str, ...], now: float) -> bool:
        """[7] Three failures, and not at one place alone while there are others: one sick device fails everything.

        places: where it failed, once for each time; reward: "" for a rollout.
        """
        return len(places) >= FAILURES and (len(set(places)) > 1 or not self._others(state, reward, set(places), now))

    def _others(self, state: State, reward: str, places: set[str], now: float) -> set[str]:
        """Other places that are at work: each asks again as soon as it is done, so who has not for long hangs."""
        timeout = self.lease_timeouts[reward] if reward else self.claim_timeout_s
        at_work = {place for (role, place), asked in state.asked.items() if role == reward and now - asked <= timeout}
        return at_work - places

    # ---- batches and evaluations

    def over(self, state: State, order_id: str) -> bool:
        """An order that its batch need not wait for: scored by every reward it wants, or set aside altogether."""
        work = work_of(state, order_id)
        if len(work.set_aside) == self.sizes.order_size:
            return True
        scored = (self.score_of(work, reward) is not None for reward in self.rewards_of(order_id))
        return work.rollout is not None and all(scored)

    def complete(self, state: State, orders: tuple[str, ...]) -> bool:
        """[2, 8] All orders of a batch are over, and not too much is set aside."""
        return self.all_over(state, orders) and not self.failed_too_much(state, orders)

    def all_over(self, state: State, orders: tuple[str, ...]) -> bool:
        """All that an evaluation needs: it shows what there is, and stops nothing."""
        return all(self.over(state, order_id) for order_id in orders)

    def hopeless(self, state: State, evaluation: Evaluation) -> str | None:
        """Why an evaluation comes to nothing before the next start, which tries it again; None if it goes on."""
        orders = self.sizes.evaluation_orders(evaluation)
        reasons = [reason for order_id in orders for _, reason in work_of(state, order_id).set_aside]
        if len(reasons) == len(orders) * self.sizes.order_size:
            return f"all of its pictures failed, the last one by {reasons[-1]}"
        resting = next((order_id for order_id in orders if self.rests(state, order_id)), None)
        return f"{DEATHS} workers died on its order {resting}" if resting else None

    def failed_too_much(self, state: State, orders: tuple[str, ...]) -> bool:
        """[9] More than max_failed_share of the pictures are set aside, or all of them."""
        aside = sum(len(work_of(state, order_id).set_aside) for order_id in orders)
        total = len(orders) * self.sizes.order_size
        return aside > self.max_failed_share * total or aside == total

    def roster(self, state: State, batch: int) -> str:
        """[8] Digest of what a batch trains on: each order's table, scores and pictures set aside."""
        rows = []
        for order_id in self.sizes.batch_orders(batch):
            work = work_of(state, order_id)
            scores = [(score.reward, score.file.digest) for score in work.scores]
            files = [file.digest for file in work.rollout or () if file]
            rows.append((order_id, files, scores, [trajectory_id for trajectory_id, _ in work.set_aside]))
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]

    def may_train(self, state: State) -> int | None:
        """[2] The batch that may be taken now: the one after the last trained, if it is ready."""
        batch = state.next_batch
        return batch if batch in state.rosters else None

    def trains(self, state: State, batch: int, roster: str) -> bool:
        """[8, 10] Whether this is the batch to train, on the roster that is frozen; the first call wins."""
        return batch == state.next_batch and state.rosters.get(batch) == roster

    def path_that_counts(self, state: State, version: int, offered: Trained) -> Trained:
        """[11] What `trained` answers with: the version as journaled, not as offered."""
        return state.trained[version]

    # ---- versions

    def served(self, state: State) -> set[int]:
        """[12, 14] Versions that an order may still ask for: the last k + 1, and those of open evaluations."""
        newest = state.next_batch
        evaluated = {version for version, _ in self.open_evaluations(state)}
        return set(range(max(newest - self.max_staleness, 0), newest + 1)) | evaluated

    def kept(self, state: State) -> set[int]:
        """[14] Versions whose recovery points are kept: those served, and `keep_checkpoints` before them."""
        first = state.next_batch - self.max_staleness - self.keep_checkpoints
        return set(range(max(first, 0), state.next_batch + 1)) | self.served(state)

    def open_evaluations(self, state: State) -> list[Evaluation]:
        """Versions that are trained and due to be evaluated on a set, and neither are nor were missed, oldest first."""
        due = [Evaluation(v, name) for name, one in self.sets.items() for v in one.versions if v <= state.next_batch]
        return sorted((each for each in due if each not in state.evaluations), key=lambda each: each.version)

    def begun(self, state: State) -> list[Evaluation]:
        """Evaluations that have work and are not over, due or not: run.batches may have been raised since."""
        found = {name for o in state.work if (name := parse(o).evaluation) and name not in state.evaluations}
        return sorted(found)

    def retired(self, state: State) -> list[str]:
        """Orders whose tensors go: of batches trained long enough ago, of old or missed evaluations."""
        finished = [each for each, parquet in state.evaluations.items() if parquet is not None]
        grids = [e for name in self.sets for e in [e for e in finished if e.set == name][-EVALUATIONS_KEPT:]]
        retired = []
        for order_id in state.work:
            evaluation, group, _ = parse(order_id)
            if evaluation in state.evaluations and evaluation not in grids:
                retired.append(order_id)
            if not evaluation and group < state.next_batch - self.keep_batches:
                retired.append(order_id)
        return retired

    # ---- the end

    def reopened(self, state: State) -> list[str]:
        """[9] What a new epoch tries again: orders with pictures set aside that are not trained or evaluated yet."""
        return [o for o, work in state.work.items() if work.set_aside and not self.closed(state, o)]

    def stop(self, state: State) -> str | None:
        """[7, 9] Why the run cannot go on, in a sentence; or None. An evaluation is never the reason."""
        for (work, reward), deaths in state.deaths.items():
            if deaths >= DEATHS and not work.startswith("e"):
                doing = f"scoring it with {reward}" if reward else "working on it"
                return (
                    f"{deaths} workers died on the same work ({work}, {doing}) while their nodes lived; look at their "
                    "logs (out of memory? or slower than its time-out?), mend it, and start the run again."
                )
        names = [parse(o) for o, work in state.work.items() if work.set_aside and not self.closed(state, o)]
        for batch in sorted({name.group for name in names if not name.evaluation}):
            orders = self.sizes.batch_orders(batch)
            if self.failed_too_much(state, orders):
                reasons = [reason for o in orders for _, reason in work_of(state, o).set_aside]
                return (
                    f"{len(reasons)} of the {len(orders) * self.sizes.order_size} pictures of batch {batch} failed, "
                    f"more than buffer.max_failed_share={self.max_failed_share:g} allows; the last reason: "
                    f"{reasons[-1]}. Mend it and start the run again, which tries them again."
                )
        return None

    def finished(self, state: State) -> bool:
        """All batches trained and no evaluation open."""
        return state.next_batch >= self.batches and not self.open_evaluations(state)

    # ---- files

    def needed_files(self, state: State) -> set[str]:
        """Paths in the run folder that the state names and somebody may still ask for; whatever else bears a run's own
        names was never acknowledged, or is needed no more."""
        needed = {trained.parquet for trained in state.trained} | {path for path in state.evaluations.values() if path}
        if state.trained:
            needed |= {state.trained[version].recovery_point for version in self.kept(state)}
        for work in state.work.values():
            needed |= {file.path for file in work.rollout or () if file}
            needed |= {score.file.path for score in work.scores}
        return needed

    def old_recovery_points(self, state: State) -> list[str]:
        """[14] Recovery points that count and are kept no longer. Never one that is being written, which the state
        cannot name: a later `trained` is journaled before anything is in this list."""
        old = set(range(len(state.trained))) - self.kept(state)
        return [state.trained[version].recovery_point for version in sorted(old)]
