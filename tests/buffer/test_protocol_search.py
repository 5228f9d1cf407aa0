"""Exhaustive search of the real state machine over small runs, and what it finds when a rule is taken out.

The world is protocol_world.py. Every reachable state is visited; in each, what is trained has to be complete, in
order, of one line of weights, and not older than k; what was acknowledged has to stay; and without further faults the
run has to be able to go on until it is finished, never in a circle.
"""

import itertools
from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from buffer import transitions
from buffer.journal import counted
from buffer.orders import Sizes, Version
from buffer.rules import Rules, SetRules
from buffer.state import File, Hold, Record, Score, State, Step, Trained, Work, fold, restarted, work_of
from tests.buffer.protocol_world import REWARD, TIMEOUT, WANTED, Violation, World, rolled_out

EVERYTHING = frozenset({"buffer", "worker", "hang", "learner", "damage", "answer"})
SIZES = Sizes(batch_size=2, order_size=1, sets=(("train", 1), ("other", 1)))


def small(rules: type[Rules] = Rules, batches: int = 3, k: int = 1, **evaluated: tuple[int, ...]) -> Rules:
    """A run of batches of two orders of one picture. evaluated: versions by set."""
    return rules(
        SIZES,
        (REWARD,),
        batches,
        max_staleness=k,
        keep_batches=0,
        keep_checkpoints=0,
        claim_timeout_s=TIMEOUT,
        lease_timeouts={REWARD: TIMEOUT} | ({"taste": TIMEOUT} if "other" in evaluated else {}),
        sets={name: SetRules(versions, WANTED[name]) for name, versions in evaluated.items()},
    )


def search(world: World, bad: frozenset[str] = frozenset()) -> int:
    """Visit every state, breadth first; returns how many there are. Raises Violation."""
    first = world.start(bad)
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


@pytest.mark.parametrize(
    ("batches", "faults", "kinds", "k"),
    [
        pytest.param(3, 1, EVERYTHING, 1, marks=pytest.mark.long),
        pytest.param(2, 2, frozenset({"worker", "learner", "damage"}), 1, marks=pytest.mark.long),
        pytest.param(2, 2, frozenset({"buffer", "learner"}), 1, marks=pytest.mark.long),
        (2, 1, EVERYTHING, 1),
        (2, 1, EVERYTHING, 0),
        (3, 0, EVERYTHING, 2),
        pytest.param(3, 2, frozenset({"worker", "learner"}), 1, marks=pytest.mark.slow),
        pytest.param(3, 2, frozenset({"buffer", "learner"}), 1, marks=pytest.mark.slow),
    ],
)
def test_no_state_breaks_a_rule_and_every_state_can_finish(
    batches: int, faults: int, kinds: frozenset[str], k: int
) -> None:
    states = search(World(small(batches=batches, k=k), faults, kinds))
    assert states > 100
    print(f"{states:,} states")


@pytest.mark.parametrize("fault", ["worker", "buffer", "learner", "hang"])
def test_pictures_that_raise_are_set_aside_or_stop_the_run_until_it_is_mended(fault: str) -> None:
    """One bad picture of two is left out; two stop the run, somebody mends the reward, and it finishes."""
    rules = replace(small(batches=1), max_failed_share=0.5)
    for bad in (frozenset({"b00000.01"}), frozenset({"b00000.00", "b00000.01"})):
        assert search(World(rules, 1, frozenset({fault})), bad) > 50


@pytest.mark.long
@pytest.mark.parametrize("fault", [None, "worker", "buffer", "damage"])
def test_evaluations_on_two_sets_with_rewards_of_their_own_hold_nothing_up(fault: str | None) -> None:
    rules = small(batches=1, k=0, train=(1,), other=(0, 1))
    assert search(World(rules, int(fault is not None), frozenset({fault} if fault else ()))) > 100


class RewardsOfTheRun(Rules):
    """An evaluation is scored by the rewards that are trained on, whatever its set wants."""

    def rewards_of(self, order_id: str) -> tuple[str, ...]:
        return self.rewards


class NewestForEvaluations(Rules):
    """[1] An evaluation's orders are rolled out by the newest version, as a batch's are."""

    def binding(self, state: State, order_id: str) -> Version | None:
        bound = work_of(state, order_id).version
        newest = max(state.published, default=None)
        return bound or (None if newest is None else state.trained[newest].version)


@pytest.mark.parametrize("mutant", [RewardsOfTheRun, NewestForEvaluations])
def test_an_evaluation_goes_wrong_without(mutant: type[Rules]) -> None:
    with pytest.raises(Violation):
        search(World(small(mutant, batches=1, k=0, train=(1,), other=(0, 1)), 0, frozenset()))


# ---- the rules, taken out one at a time


class NoAdmission(Rules):
    """[1] Any batch may be claimed at any time."""

    def admitted(self, state: State, batch: int) -> bool:
        return batch < self.batches and bool(state.published)


class NoBinding(Rules):
    """[1] Every claim is answered with the newest version, as if there had been none before."""

    def binding(self, state: State, order_id: str) -> Version | None:
        return state.trained[max(state.published)].version if state.published else None


class AnyTrainingOrder(Rules):
    """[2] Whichever batch is ready first is trained next."""

    def may_train(self, state: State) -> int | None:
        return max(state.rosters, default=None)

    def trains(self, state: State, batch: int, roster: str) -> bool:
        return state.rosters.get(batch) == roster


class NotWaitingForScores(Rules):
    """[2] A batch is ready when it is rolled out."""

    def over(self, state: State, order_id: str) -> bool:
        return work_of(state, order_id).rollout is not None


class LastTableWins(Rules):
    """[3] A table that comes later replaces the one that counts."""

    def counts(self, work: Work, version: Version) -> bool:
        return work.version == version


class NoDigestOfScores(Rules):
    """[4] Scores count for the order, whatever table they were made from."""

    def scores_count(self, work: Work, table_digest: str) -> bool:
        return work.rollout is not None

    def score_of(self, work: Work, reward: str) -> Score | None:
        return next((score for score in work.scores if score.reward == reward), None)


class NoTimeouts(Rules):
    """[5] A claim is its holder's for ever."""

    def offered(self, holds: tuple[Hold, ...], timeout: float, now: float) -> bool:
        return not holds

    def overdue(self, holds: tuple[Hold, ...], limit: float, now: float) -> list[str]:
        return []


class NoSecondAnswer(Rules):
    """[5] Who asks again is given other work, though what it has already is all that is left."""

    def held(self, holds: tuple[Hold, ...], worker: str) -> bool:
        return False


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


@pytest.mark.long
@pytest.mark.parametrize(
    ("mutant", "batches", "fault"),
    [
        (NoAdmission, 3, None),
        (NoBinding, 2, "worker"),
        (AnyTrainingOrder, 2, None),
        (NotWaitingForScores, 1, None),
        (LastTableWins, 1, "hang"),
        (NoDigestOfScores, 1, "damage"),
        (NoTimeouts, 1, "hang"),
        (NoSecondAnswer, 1, "answer"),
        (NoFrozenRoster, 1, "damage"),
        (OwnPathCounts, 2, "learner"),
        (KeepsOnlyK, 2, "buffer"),
        (PublishesTheNewest, 2, "buffer"),
    ],
)
def test_a_run_goes_wrong_without(mutant: type[Rules], batches: int, fault: str | None) -> None:
    kinds = frozenset({fault} if fault else ())
    search(World(small(batches=batches), int(fault is not None), kinds))  # with the rule all is well
    with pytest.raises(Violation):
        search(World(small(mutant, batches), int(fault is not None), kinds))


class OnePlaceSuffices(Rules):
    """[7] Three failures set work aside, wherever they were."""

    def spares(self, state: State, work: Work, reward: str, worker: str, now: float) -> bool:
        return False

    def is_set_aside(self, state: State, reward: str, places: tuple[str, ...], now: float) -> bool:
        return len(places) >= 3


def test_a_place_where_everything_fails_costs_no_picture_while_another_works() -> None:
    for faults, kinds in ((0, frozenset[str]()), (1, frozenset({"buffer"})), (1, frozenset({"learner"}))):
        assert search(World(small(batches=1), faults, kinds, sick="a")) > 30
    with pytest.raises(Violation):
        search(World(small(OnePlaceSuffices, batches=1), 0, frozenset(), sick="a"))


class UnjournaledBinding(World):
    """[1] The claim is answered, and its binding is in memory only."""

    def journaled(self, step: Step) -> tuple[Record, ...]:
        return tuple(record for record in step.records if record["kind"] != "claimed")


def test_a_run_goes_wrong_when_bindings_are_not_journaled() -> None:
    with pytest.raises(Violation):
        search(UnjournaledBinding(small(batches=2), 1, frozenset({"buffer"})))


class NeverReopened(Rules):
    """[9] What is set aside stays so, though somebody has mended the reward."""

    def reopened(self, state: State) -> list[str]:
        return []


def test_a_mended_run_does_not_go_on_without_reopening() -> None:
    rules = replace(small(NeverReopened, batches=1), max_failed_share=0.4)
    with pytest.raises(Violation):
        search(World(rules, 0, frozenset()), frozenset({"b00000.00"}))


# ---- split brain: a buffer that was cut off goes on by itself


class Side:
    """One epoch's buffer, everything that works for it, and its journal; `counted` says what it reads of others."""

    def __init__(self, rules: Rules, journals: list[list[tuple[Record, ...]]], reads: Callable[..., Any]) -> None:
        self.rules = rules
        epochs = dict(enumerate(journals, 1))
        limits = reads({epoch: lines[0][0]["seals"] for epoch, lines in epochs.items()})
        self.state = State()
        for epoch, lines in epochs.items():
            for line in lines[: limits[epoch]]:
                for record in line:
                    self.state = fold(self.state, record)
        self.inherited = self.state
        seals = {epoch: len(lines) if limits[epoch] is None else limits[epoch] for epoch, lines in epochs.items()}
        self.epoch = len(journals) + 1
        self.journal: list[tuple[Record, ...]] = [({"kind": "opened", "epoch": self.epoch, "seals": seals},)]
        journals.append(self.journal)
        self.state = fold(self.state, self.journal[0][0])
        self.told: list[tuple[str, Version]] = []

    def do(self, step: Step) -> Any:
        if step.records:
            self.journal.append(step.records)
        self.state = step.state
        return step.answer

    def go_on(self) -> None:
        """The one thing that is to be done next."""
        state, rules = self.state, self.rules
        if not state.trained:
            self.do(transitions.trained(rules, state, -1, Trained(Version(0, "0"), "0", "", ""), 0.0))
        elif missing := sorted(rules.served(state) - state.published):
            self.do(transitions.publish(rules, state, state.trained[missing[-1]].version))
        elif answer := self.do(transitions.lease(rules, state, REWARD, "b", 0.0)):
            file = File("", f"of {answer[1].digest} in epoch {self.epoch}")
            self.do(transitions.add_scores(rules, self.state, REWARD, answer[0], answer[1].digest, file, 0.0))
        elif (batch := self.do(transitions.take(rules, state, "learner", 0.0))) is not None:
            version = Version(batch + 1, f"{state.trained[-1].version.digest}.{self.epoch}")
            roster = state.rosters[batch]
            self.do(transitions.trained(rules, self.state, batch, Trained(version, version.digest, "", roster), 0.0))
        elif answer := self.do(transitions.claim(rules, state, "a", 0.0)):
            order_id, version = answer
            self.told.append((order_id, version))
            self.add(order_id, version)

    def add(self, order_id: str, version: Version) -> None:
        digest = f"{order_id}@{version.digest} in epoch {self.epoch}"
        counts = self.do(transitions.add(self.rules, self.state, order_id, version, rolled_out(digest), 0.0))
        if counts and work_of(self.state, order_id).version != version:
            raise Violation(f"{order_id} has a table of {version}")


def split_brain(rules: Rules, reads: Callable[..., Any] = counted) -> int:
    """A buffer does some steps and is cut off; a second takes over while the first goes on, and its workers call the
    second by and by; then a third takes over. Every combination of how far each gets."""
    tried = 0
    for before, beside, after in itertools.product(range(0, 14), range(0, 14), range(0, 14)):
        journals: list[list[tuple[Record, ...]]] = []
        first = Side(rules, journals, reads)
        for _ in range(before):
            first.go_on()
        second = Side(rules, journals, reads)
        for _ in range(beside):
            first.go_on()
        for _ in range(after):
            second.go_on()
        for order_id, version in first.told:
            if not rules.closed(second.state, order_id):
                second.add(order_id, version)
        third = Side(rules, journals, reads)
        if third.inherited != restarted(second.state):
            raise Violation(f"the third epoch does not go on from the second: {before}, {beside}, {after}")
        tried += 1
    return tried


@pytest.mark.long
def test_what_a_cut_off_buffer_does_counts_for_nobody() -> None:
    assert split_brain(small(batches=2)) == 14**3


def everything(seals: dict[int, Any]) -> dict[int, None]:
    """[16] No seals: a start reads all that is there."""
    return dict.fromkeys(seals)


class AnyWeights(Rules):
    """[3] A table counts whatever weights it was made with."""

    def counts(self, work: Work, version: Version) -> bool:
        return work.rollout is None


def test_a_cut_off_buffer_does_harm_without_seals() -> None:
    with pytest.raises((Violation, IndexError)):
        split_brain(small(batches=2), everything)


def test_a_cut_off_buffers_workers_do_harm_without_digests() -> None:
    with pytest.raises(Violation):
        split_brain(small(AnyWeights, batches=2))
