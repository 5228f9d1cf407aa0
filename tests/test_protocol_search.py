"""Exhaustive search of the real state machine over small runs, and what it finds when a rule is taken out.

The world is tests/protocol_world.py. Every reachable state is visited; in each, what is trained has to be complete, in
order, of one line of weights, and not older than k; what was acknowledged has to stay; and without further faults the
run has to be able to go on until it is finished, never in a circle.
"""

import json
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest

from buffer import journal, rollouts, scoring, training
from buffer.journal import counted
from buffer.orders import Sizes, Version
from buffer.rules import Rules
from buffer.state import File, Hold, Score, State, Trained, Work, fold, restarted, work_of
from tests.protocol_world import REWARD, TIMEOUT, Violation, World

EVERYTHING = frozenset({"buffer", "worker", "hang", "learner", "damage"})
SIZES = Sizes(batch_size=2, order_size=1, evaluation_count=1)


def small(rules: type[Rules] = Rules, batches: int = 3, k: int = 1) -> Rules:
    """A run of batches of two orders of one picture."""
    return rules(
        SIZES,
        (REWARD,),
        batches,
        max_staleness=k,
        keep_batches=0,
        keep_checkpoints=0,
        claim_timeout_s=TIMEOUT,
        lease_timeouts={REWARD: TIMEOUT},
    )


def search(world: World) -> int:
    """Visit every state, breadth first; returns how many there are. Raises Violation."""
    first = world.start()
    number = {first.key(): 0}
    queue = [first]
    edges_from, edges_to = array("l"), array("l")  # those without a fault, to look for circles afterwards
    for here, node in enumerate(queue):
        moves = 0
        for calm, after in [(True, n) for n in world.calm(node)] + [(False, n) for n in world.late(node)]:
            there = number.setdefault(after.key(), len(queue))
            if there == len(queue):
                queue.append(after)
            if there != here:
                moves += calm
                edges_from.append(here)
                edges_to.append(there)
        if not moves and not world.finished(node):
            raise Violation(f"nothing can happen any more, and the run is not finished: {node}")
        for after in world.faulty(node):
            if number.setdefault(after.key(), len(queue)) == len(queue):
                queue.append(after)
        queue[here] = None  # type: ignore[call-overload]  # visited: let go of it
    _refuse_circles(len(queue), edges_from, edges_to)
    return len(queue)


def _refuse_circles(nodes: int, edges_from: array, edges_to: array) -> None:
    """Without faults no state comes back (a topological order exists), so every run of moves comes to its end."""
    waiting = Counter(edges_to)
    after: list[list[int]] = [[] for _ in range(nodes)]
    for here, there in zip(edges_from, edges_to, strict=True):
        after[here].append(there)
    free = [node for node in range(nodes) if node not in waiting]
    seen = 0
    while free:
        seen += 1
        for there in after[free.pop()]:
            waiting[there] -= 1
            if not waiting[there]:
                free.append(there)
    if seen != nodes:
        raise Violation("a run without faults can go in a circle")


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("batches", "faults", "kinds", "k"),
    [
        (3, 1, EVERYTHING, 1),
        (2, 2, frozenset({"worker", "learner", "damage"}), 1),
        (2, 2, frozenset({"buffer", "learner"}), 1),
        (2, 1, EVERYTHING, 0),
        (3, 0, EVERYTHING, 2),
    ],
)
def test_no_state_breaks_a_rule_and_every_state_can_finish(
    batches: int, faults: int, kinds: frozenset[str], k: int
) -> None:
    states = search(World(small(batches=batches, k=k), faults, kinds))
    assert states > 100


# ---- the rules, taken out one at a time


class NoAdmission(Rules):
    """[1] Any batch may be claimed at any time."""

    def admitted(self, state: State, batch: int) -> bool:
        return batch < self.batches and bool(state.published)


class NoBinding(Rules):
    """[1] Every claim is answered with the newest version, as if there had been none before."""

    def binding(self, state: State, order_id: str) -> Version | None:
        return state.trained[max(state.published)].version if state.published else None


class UnjournaledBinding(Rules):
    """[1] The claim is answered, and the binding is in memory only."""

    def claim_records(self, work: Work) -> bool:
        return False


class AnyTrainingOrder(Rules):
    """[2] Whichever batch is ready first is trained next."""

    def may_train(self, state: State) -> int | None:
        return max(state.rosters, default=None)

    def trains(self, state: State, batch: int, roster: str) -> bool:
        return state.rosters.get(batch) == roster


class NotWaitingForScores(Rules):
    """[2] A batch is ready when it is rolled out."""

    def over(self, work: Work) -> bool:
        return work.table is not None


class LastTableWins(Rules):
    """[3] A table that comes later replaces the one that counts."""

    def counts(self, work: Work, version: Version, worker_holds: bool) -> bool:
        return work.version == version


class NoDigestOfScores(Rules):
    """[4] Scores count for the order, whatever table they were made from."""

    def scores_count(self, work: Work, table_digest: str) -> bool:
        return work.table is not None

    def score_of(self, work: Work, reward: str) -> Score | None:
        return next((score for score in work.scores if score.reward == reward), None)


class NoTimeouts(Rules):
    """[5] A claim is its holder's for ever."""

    def offered(self, holds: tuple[Hold, ...], timeout: float, now: float) -> bool:
        return not holds

    def overdue(self, holds: tuple[Hold, ...], timeout: float, now: float) -> list[str]:
        return []


class NoFrozenRoster(Rules):
    """[8] `trained` asks for the number of the batch only, not for what it was trained on."""

    def trains(self, state: State, batch: int, roster: str) -> bool:
        return batch == state.next_batch


class OwnPathCounts(Rules):
    """[11] `trained` tells every learner that its own recovery point counts."""

    def path_that_counts(self, state: State, version: int, offered: Trained) -> Trained:
        return offered


class KeepsOnlyK(Rules):
    """[14] Of the last k + 1 versions only k are there to be published after a restart."""

    def served(self, state: State) -> set[int]:
        newest = state.next_batch
        return set(range(max(newest - self.max_staleness + 1, 0), newest + 1))


class PublishesTheNewest(Rules):
    """[12] After a restart only the newest version is published again."""

    def served(self, state: State) -> set[int]:
        return {state.next_batch}


@pytest.mark.parametrize(
    ("mutant", "faults"),
    [
        (NoAdmission, 0),
        (NoBinding, 1),
        (UnjournaledBinding, 1),
        (AnyTrainingOrder, 0),
        (NotWaitingForScores, 0),
        (LastTableWins, 1),
        (NoDigestOfScores, 1),
        (NoTimeouts, 1),
        (NoFrozenRoster, 1),
        (OwnPathCounts, 1),
        (KeepsOnlyK, 1),
        (PublishesTheNewest, 1),
    ],
)
def test_a_run_goes_wrong_without(mutant: type[Rules], faults: int) -> None:
    with pytest.raises(Violation):
        search(World(small(mutant), faults, EVERYTHING))
