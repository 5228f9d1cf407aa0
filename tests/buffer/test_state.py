"""The state machine under random claims, adds, scores, time-outs, deaths, restarts and old epochs that go on writing.

Invariants: nothing acknowledged is lost, nothing is trained twice, batches train in order, no trajectory is older than
k; and from every state reached, a run without further faults finishes.
"""

from typing import Any, get_args

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from buffer import transitions
from buffer.journal import counted
from buffer.orders import Sizes, Version
from buffer.protocol import Charged, Refused
from buffer.rules import Rules, SetRules
from buffer.state import File, Record, State, Step, Trained, fold, restarted, work_of
from tests.buffer.protocol_world import rolled_out

SIZES = Sizes(batch_size=4, order_size=2, sets=(("train", 2),))
WORKERS = ("a", "b", "c")
REWARDS = ("size", "taste")
worker_names = st.sampled_from(WORKERS)


def rules_of(**changed: Any) -> Rules:
    given: dict[str, Any] = {
        "batches": 4,
        "max_staleness": 1,
        "keep_batches": 1,
        "keep_checkpoints": 0,
        "claim_timeout_s": 10.0,
        "lease_timeouts": dict.fromkeys(REWARDS, 10.0),
        "max_failed_share": 0.5,
        "sets": {"train": SetRules((0, 2, 4), REWARDS)},
    }
    return Rules(SIZES, REWARDS, **(given | changed))


class Epoch:
    """One buffer: its state and its journal, which is what other epochs can read of it."""

    def __init__(self, rules: Rules, number: int, journals: dict[int, list[list[Record]]]) -> None:
        self.rules = rules
        self.number = number
        seals = {epoch: lines[0][0]["seals"] if lines else None for epoch, lines in journals.items()}
        limits = counted(seals)
        history = [line for epoch in sorted(journals) for line in journals[epoch][: limits[epoch]]]
        state = State()
        for line in history:
            for record in line:
                state = fold(state, record)
        self.inherited = state
        read = {e: len(lines) if limits[e] is None else limits[e] for e, lines in journals.items()}
        self.journal: list[list[Record]] = []
        journals[number] = self.journal
        opened = {"kind": "opened", "epoch": number, "seals": read}
        self.state = state
        self.do(Step(fold(state, opened), (opened,)))
        self.do(transitions.reopen(rules, self.state))

    def do(self, step: Step) -> Any:
        if step.records:
            self.journal.append(list(step.records))
        self.state = step.state
        return step.answer


class Buffers(RuleBasedStateMachine):
    """Random faults around one counting epoch and one that was cut off and goes on by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.journals: dict[int, list[list[Record]]] = {}
        self.now = 0.0
        self.made = 0  # tables, scores and weights, so that each is told from all others
        self.ages: list[int] = []

    @initialize(k=st.integers(0, 2))
    def begin(self, k: int) -> None:
        self.rules_ = rules_of(max_staleness=k)
        self.epoch = Epoch(self.rules_, 1, self.journals)
        self.old: Epoch | None = None
        self.calls: list[tuple[Any, ...]] = []  # answers that workers got, and may act on at any time, or twice
        self.acknowledged: dict[str, str] = {}  # order -> table, of the counting line
        self.line: list[Version] = []
        self.bound: dict[str, Version] = {}
        self.register(self.epoch)

    # ---- what goes on in a buffer; with the cut-off one as well as with the one that counts

    def register(self, epoch: Epoch) -> None:
        if not epoch.state.trained:
            first = Trained(Version(0, "w0"), "w0", "", "")
            epoch.do(transitions.trained(self.rules_, epoch.state, -1, first, self.now))
        self.saw_training(epoch)

    def saw_training(self, epoch: Epoch) -> None:
        if epoch is self.epoch:
            self.line = [t.version for t in epoch.state.trained]

    def side(self, old: bool) -> Epoch:
        return self.old if old and self.old is not None else self.epoch

    @rule(old=st.booleans())
    def publish(self, old: bool) -> None:
        epoch = self.side(old)
        for number in sorted(self.rules_.served(epoch.state) - epoch.state.published)[:1]:
            epoch.do(transitions.publish(self.rules_, epoch.state, epoch.state.trained[number].version))

    @rule(old=st.booleans(), worker=worker_names)
    def claim(self, old: bool, worker: str) -> None:
        epoch = self.side(old)
        answer = epoch.do(transitions.claim(self.rules_, epoch.state, worker, self.now))
        if answer:
            order_id, version = answer
            assert work_of(epoch.state, order_id).version == version
            self.calls.append(("add", order_id, version))

    @rule(old=st.booleans(), worker=worker_names, reward=st.sampled_from(REWARDS))
    def lease(self, old: bool, worker: str, reward: str) -> None:
        epoch = self.side(old)
        answer = epoch.do(transitions.lease(self.rules_, epoch.state, reward, worker, self.now))
        if answer:
            self.calls.append(("scores", reward, answer[0], answer[1].digest))

    @precondition(lambda self: self.calls)
    @rule(old=st.booleans(), which=st.integers(0, 10**6), again=st.booleans())
    def deliver(self, old: bool, which: int, again: bool) -> None:
        """A call arrives: late, twice, at the other buffer, from a worker that died long ago."""
        place = which % len(self.calls)
        call = self.calls[place] if again else self.calls.pop(place)
        self.call(self.side(old), call)

    def call(self, epoch: Epoch, call: tuple[Any, ...]) -> None:
        self.made += 1
        if call[0] == "add":
            _, order_id, version = call
            digest = f"{order_id}@{version}#{self.made}"
            step = transitions.add(self.rules_, epoch.state, order_id, version, rolled_out(digest), self.now)
            if epoch.do(step) and epoch is self.epoch:
                assert order_id not in self.acknowledged, "a second table counts"
                self.acknowledged[order_id] = digest
        elif call[0] == "scores":
            _, reward, order_id, table = call
            file = File(f"{reward}#{self.made}", f"of {table}")
            epoch.do(transitions.add_scores(self.rules_, epoch.state, reward, order_id, table, file, self.now))
        else:
            self.trained(epoch, *call[1:])
        self.finish_evaluations(epoch)

    @rule(old=st.booleans(), learner=st.sampled_from(("l1", "l2")))
    def take(self, old: bool, learner: str) -> None:
        epoch = self.side(old)
        batch = epoch.do(transitions.take(self.rules_, epoch.state, learner, self.now))
        if batch is not None:
            orders = self.rules_.sizes.batch_orders(batch)
            rows = tuple((o, work_of(epoch.state, o)) for o in orders)
            self.calls.append(("trained", batch, epoch.state.rosters[batch], epoch.state.trained[-1].version, rows))

    def trained(self, epoch: Epoch, batch: int, roster: str, parent: Version, rows: Any) -> None:
        before = len(epoch.state.trained)
        version = Version(batch + 1, f"{parent.digest}.{self.made}")
        try:
            offered = Trained(version, version.digest, version.digest, roster)
            step = transitions.trained(self.rules_, epoch.state, batch, offered, self.now)
        except Refused:
            return
        counts = epoch.do(step)
        assert epoch.state.trained[batch + 1] == counts
        if len(epoch.state.trained) == before:
            return
        assert batch == before - 1, "out of order"
        for order_id, work in rows:
            if len(work.set_aside) == SIZES.order_size:
                continue
            assert work.rollout and work.version
            pictures = work.rollout.images.digest
            assert pictures.startswith(f"{order_id}@{work.version}") and work.rollout == rolled_out(pictures)
            assert {score.file.digest for score in work.scores} == {f"of {pictures}"}
            assert len(work.scores) == len(REWARDS)
            assert batch - work.version.number <= self.rules_.max_staleness
            self.ages.append(batch - work.version.number)
        self.saw_training(epoch)

    def finish_evaluations(self, epoch: Epoch) -> None:
        for evaluation in self.rules_.open_evaluations(epoch.state):
            orders = self.rules_.sizes.evaluation_orders(evaluation)
            if why := self.rules_.hopeless(epoch.state, evaluation):
                if epoch.state.next_batch >= self.rules_.batches:
                    epoch.do(transitions.missed(self.rules_, epoch.state, evaluation, why, self.now))
            elif self.rules_.all_over(epoch.state, orders):
                epoch.do(transitions.evaluated(self.rules_, epoch.state, evaluation, "rows", self.now))

    @rule(rounds=st.integers(1, 8))
    def goes_well_for_a_while(self, rounds: int) -> None:
        for _ in range(rounds):
            go_on(self)

    # ---- failures

    @rule(old=st.booleans(), worker=worker_names)
    def rollout_raises(self, old: bool, worker: str) -> None:
        epoch = self.side(old)
        for order_id, holds in list(epoch.state.claims.items()):
            if worker in [hold.worker for hold in holds]:
                epoch.do(transitions.order_failed(self.rules_, epoch.state, order_id, worker, "boom", self.now))
        self.finish_evaluations(epoch)

    @rule(old=st.booleans(), worker=worker_names, row=st.integers(0, 1))
    def picture_raises(self, old: bool, worker: str, row: int) -> None:
        epoch = self.side(old)
        for (order_id, reward), holds in list(epoch.state.leases.items()):
            rollout = work_of(epoch.state, order_id).rollout
            if rollout and worker in [hold.worker for hold in holds]:
                picture = SIZES.trajectory_ids(order_id)[row]
                step = transitions.pictures_failed(
                    self.rules_,
                    epoch.state,
                    reward,
                    order_id,
                    rollout.images.digest,
                    worker,
                    {picture: "blank"},
                    self.now,
                )
                epoch.do(step)
        self.finish_evaluations(epoch)

    @rule(old=st.booleans(), worker=st.sampled_from((*WORKERS, "l1", "l2")), charged=st.sampled_from(get_args(Charged)))
    def dies(self, old: bool, worker: str, charged: Charged) -> None:
        epoch = self.side(old)
        epoch.do(transitions.worker_died(self.rules_, epoch.state, worker, charged, self.now))

    @rule(seconds=st.sampled_from((1.0, 11.0, 25.0)))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(which=st.integers(0, 10**6))
    def file_is_damaged(self, which: int) -> None:
        state = self.epoch.state
        orders = [o for o, work in state.work.items() if work.rollout and not self.rules_.closed(state, o)]
        if orders:
            order_id = sorted(orders)[which % len(orders)]
            self.epoch.do(transitions.damaged(self.rules_, state, order_id, None, "", self.now))
            self.acknowledged.pop(order_id, None)

    @rule(cut_off=st.booleans())
    def restarts(self, cut_off: bool) -> None:
        """The driver starts anew; the buffer before it is dead, or only cut off."""
        before = self.epoch
        self.epoch = Epoch(self.rules_, before.number + 1, self.journals)
        assert self.epoch.inherited == restarted(before.state)._replace(epoch=before.number), "lost at the restart"
        self.old = before if cut_off else None
        self.register(self.epoch)

    # ---- what has to hold

    @invariant()
    def nothing_acknowledged_is_lost(self) -> None:
        state = self.epoch.state
        assert [t.version for t in state.trained] == self.line
        assert [v.number for v in self.line] == list(range(len(self.line)))
        for order_id, digest in self.acknowledged.items():
            if order_id in state.work:
                rollout = state.work[order_id].rollout
                assert rollout is not None and rollout.images.digest == digest
            else:
                assert self.rules_.closed(state, order_id)

    @invariant()
    def bound_is_bound(self) -> None:
        for order_id, work in self.epoch.state.work.items():
            if work.version is not None:
                assert self.bound.setdefault(order_id, work.version) == work.version

    @invariant()
    def weights_that_are_asked_for_are_kept(self) -> None:
        state = self.epoch.state
        for order_id, work in state.work.items():
            if work.version is not None and not self.rules_.closed(state, order_id):
                assert work.version.number in self.rules_.kept(state)

    def teardown(self) -> None:
        """From wherever the run has come to, it finishes once nothing goes wrong any more."""
        if not hasattr(self, "epoch"):
            return
        if self.rules_.stop(self.epoch.state):  # somebody mends it and starts again
            self.restarts(cut_off=False)
        self.now += 100.0
        for worker in (*WORKERS, "l1", "l2"):
            self.dies(False, worker, False)
        finish(self)
        assert len(self.line) == self.rules_.batches + 1


def go_on(world: Buffers) -> None:
    """Everybody does one thing, and nothing goes wrong."""
    world.publish(False)
    calls, world.calls = world.calls, []
    world.claim(False, "a")
    for reward in REWARDS:
        world.lease(False, "b", reward)
    world.take(False, "l1")
    for call in world.calls:
        world.call(world.epoch, call)
    world.calls = calls


def finish(world: Buffers) -> None:
    for _ in range(1000):
        if world.rules_.finished(world.epoch.state):
            return
        go_on(world)
    raise AssertionError(f"the run does not finish: {world.epoch.state}")


TestBuffers = Buffers.TestCase
TestBuffers.settings = settings(
    max_examples=80,
    stateful_step_count=40,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
