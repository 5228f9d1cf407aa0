"""The world around the buffer's state machine, for the exhaustive search: workers, a learner, a driver, and faults.

A node is everything that can differ: the buffer's state, what its journal says, two workers (each rolls out or scores),
the learner, messages of the dead that may still arrive, and how many faults are left. `successors` gives every node
that one call, one death or one delay leads to. The calls are those of the real machine (buffer/transitions.py);
only tables and weights are stand-ins, whose digests say what they were made from:

    weights "0", "0x", "0xy"      version 2 "0xy" was trained from version 1 "0x"
    table   "b00001.00@0x.2"      rolled out of this order with weights "0x", at its second claim

Making something again makes something else, as on other hardware: the worst case.
Times are all 0; a worker that hangs is one whose claim is made to look old.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from buffer import transitions
from buffer.orders import Version
from buffer.protocol import Refused
from buffer.rules import Rules
from buffer.state import File, Hold, Record, Rollout, State, Step, Trained, fold, restarted, work_of

REWARD = "size"
WANTED = {"train": ("size",), "other": ("taste",)}  # rewards of evaluation sets, as a run is told them
TIMEOUT = 10.0
LETTERS = "xyzuvw"
NAMES = ("a", "b")


def rolled_out(pictures: str) -> Rollout:
    """The files of a rollout, by the digest of its pictures."""
    return Rollout(File("", pictures), File("", f"path of {pictures}"))


class Violation(AssertionError):
    """Something that the rules are there to exclude."""


class Node(NamedTuple):
    state: State
    disk: State  # the fold of what is journaled: what a restart finds
    workers: tuple[Any, Any] = (None, None)  # None | ("add", order, version, attempt) | ("scores", ...) | ("hung", job)
    weights: str | None = None  # what the learner has loaded
    job: Any = None  # None | (batch, roster, rows, letter of the weights it will make) that the learner took
    ghosts: frozenset[Any] = frozenset()  # calls of the dead that may still arrive
    told: frozenset[tuple[str, Version]] = frozenset()  # claims that were answered
    faults: int = 0  # that have happened
    bad: frozenset[str] = frozenset()  # orders whose picture makes the reward raise, until somebody mends it
    claims: frozenset[tuple[str, int]] = frozenset()  # by order, how many: each leads to a table of its own

    def key(self) -> int:
        """A hash of the node that does not tell the two workers apart."""
        state = self.state
        sides = [
            (
                job,
                frozenset((order, h.since) for order, holds in state.claims.items() for h in holds if h.worker == name),
                frozenset((key, h.since) for key, holds in state.leases.items() for h in holds if h.worker == name),
                frozenset((o, key) for o, w in state.work.items() for key, places in w.failures if name in places),
            )
            for name, job in zip(NAMES, self.workers, strict=True)
        ]
        durable = _durable(state)
        disk = durable if restarted(state) == self.disk else _durable(self.disk)
        rest = (state.published, state.taken, self.weights, self.job)
        return hash((frozenset(sides) if sides[0] != sides[1] else sides[0], durable, disk, rest, *self[5:]))


def _durable(state: State) -> int:
    """Without the last field of an order's work, `newest`, by which nothing is decided."""
    work = frozenset((order_id, work[:-1]) for order_id, work in state.work.items())
    return hash((state.trained, work, frozenset(state.rosters.items()), tuple(state.evaluations)))


class World:
    def __init__(self, rules: Rules, faults: int, kinds: frozenset[str], sick: str = "") -> None:
        """sick: the worker, if any, at whose place everything raises."""
        self.rules = rules
        self.faults = faults
        self.kinds = kinds
        self.sick = sick

    def start(self, bad: frozenset[str] = frozenset()) -> Node:
        step = transitions.trained(self.rules, State(), -1, Trained(Version(0, "0"), "0", "", ""), 0.0)
        return Node(step.state, restarted(step.state), bad=bad)

    def journaled(self, step: Step) -> tuple[Record, ...]:
        return step.records

    def finished(self, node: Node) -> bool:
        return self.rules.finished(node.state)

    # ---- what happens by itself

    def calm(self, node: Node) -> Iterator[Node]:
        """What happens without a fault and without the dead: enough for the run to finish."""
        if self.rules.stop(node.state):
            yield self._restart(node._replace(bad=frozenset()))  # somebody mends it and starts the run again
            return
        for after, _ in self._calls(node):
            yield after
        yield from self._evaluations_end(node)
        for place, job in enumerate(node.workers):
            if (
                job is not None
                and job[0] == "hung"
                and NAMES[place] in transitions.overdue(self.rules, node.state, 0.0)
            ):
                yield self._died(node, place, job[1])

    def _evaluations_end(self, node: Node) -> Iterator[Node]:
        """Each that has all it needs is written, as the buffer does of itself."""
        for evaluation in self.rules.open_evaluations(node.state):
            orders = self.rules.sizes.evaluation_orders(evaluation)
            if not self.rules.all_over(node.state, orders):
                continue
            weights = node.state.trained[evaluation.version].version.digest
            for work in (work_of(node.state, order_id) for order_id in orders):
                if work.rollout is None or work.rollout.images.digest.split("@")[1].split(".")[0] != weights:
                    raise Violation(f"{evaluation} has trajectories of other weights: {work.rollout}")
                if tuple(score.reward for score in work.scores) != WANTED[evaluation.set]:
                    raise Violation(f"{evaluation} is scored by {work.scores}, and wants {WANTED[evaluation.set]}")
            yield self._apply(node, transitions.evaluated(self.rules, node.state, evaluation, "", 0.0))

    def late(self, node: Node) -> Iterator[Node]:
        """What the dead had sent arrives."""
        for ghost in node.ghosts:
            yield self._delivered(node._replace(ghosts=node.ghosts - {ghost}), ghost, None)[0]

    def faulty(self, node: Node) -> Iterator[Node]:
        """Everything that one fault can do."""
        if node.faults == self.faults:
            return
        worse = node._replace(faults=node.faults + 1)
        if "buffer" in self.kinds:
            yield self._restart(worse)
            for _, lost in self._calls(node):
                if lost is not None:  # journaled, but the buffer died before it could answer
                    yield self._restart(worse._replace(disk=lost))
        for place, job in enumerate(node.workers):
            if job is None and "answer" in self.kinds:  # it was given work, and does not know
                for after, _ in [*self._claims(worse, place), *self._leases(worse, place)]:
                    yield after._replace(workers=node.workers)
            if job is None or job[0] == "hung":
                continue
            if "worker" in self.kinds:
                yield self._died(worse, place, job)
            if "hang" in self.kinds:
                yield self._hangs(worse, place, job)
        if "learner" in self.kinds and node.job is not None:
            dead = worse._replace(weights=None, job=None, ghosts=node.ghosts | {("trained", node.weights, node.job)})
            yield self._apply(dead, transitions.worker_died(self.rules, node.state, "learner", "work", 0.0))
        if "damage" in self.kinds:
            for order_id, work in node.state.work.items():
                if work.rollout is not None and not self.rules.closed(node.state, order_id):
                    yield self._apply(worse, transitions.damaged(self.rules, node.state, order_id, None, "", 0.0))

    # ---- calls: each gives the node after it and, if it journaled something, the disk had its answer been lost

    def _calls(self, node: Node) -> Iterator[tuple[Node, State | None]]:
        state = node.state
        for number in sorted(self.rules.served(state) - state.published)[:1]:
            yield self._publish(node, number), None
        for place, job in enumerate(node.workers):
            if job is None and not (place == 1 and node.workers[0] is None and not self._told_apart(state)):
                yield from self._claims(node, place)
                yield from self._leases(node, place)
            elif job is not None and job[0] != "hung":
                done = node._replace(workers=_put(node.workers, place, None))
                yield self._delivered(done, job, NAMES[place])
        yield from self._learns(node)

    def _told_apart(self, state: State) -> bool:
        """Two idle workers are the same, unless work failed at one of them or is held by one."""
        return bool(state.claims or state.leases) or any(work.failures for work in state.work.values())

    def _publish(self, node: Node, number: int) -> Node:
        return self._apply(node, transitions.publish(self.rules, node.state, node.state.trained[number].version))

    def _claims(self, node: Node, place: int) -> Iterator[tuple[Node, State | None]]:
        step = transitions.claim(self.rules, node.state, NAMES[place], 0.0)
        if step.answer is None:
            return
        order_id, version = step.answer
        claims = dict(node.claims)
        attempt = claims[order_id] = claims.get(order_id, 0) + bool(step.records)
        for other, told in node.told:
            if other == order_id and told != version:
                raise Violation(f"{order_id} was claimed at {told} and again at {version}")
        after = self._apply(node, step)._replace(
            workers=_put(node.workers, place, ("add", order_id, version, attempt)),
            told=node.told | {(order_id, version)},
            claims=frozenset(claims.items()),
        )
        yield after, after.disk

    def _leases(self, node: Node, place: int) -> Iterator[tuple[Node, State | None]]:
        for reward in self.rules.lease_timeouts:
            step = transitions.lease(self.rules, node.state, reward, NAMES[place], 0.0)
            if step.answer is not None:
                job = ("scores", step.answer[0], step.answer[1].digest, reward)
                yield self._apply(node, step)._replace(workers=_put(node.workers, place, job)), None

    def _delivered(self, node: Node, call: Any, worker: str | None) -> tuple[Node, State | None]:
        kind, *rest = call
        if worker is not None and worker == self.sick:
            return self._failed_by_its_place(node, kind, rest, worker)
        if kind == "add":
            order_id, version, attempt = rest
            rollout = rolled_out(f"{order_id}@{version.digest}.{attempt}")
            step = transitions.add(self.rules, node.state, order_id, version, rollout, 0.0)
            if step.answer:
                node = node._replace(told=node.told - {(order_id, version)})
        elif kind == "scores":
            order_id, table, reward = rest
            if order_id in node.bad:
                return self._raised(node, order_id, table, reward, worker)
            step = transitions.add_scores(self.rules, node.state, reward, order_id, table, File("", f"of {table}"), 0.0)
        else:
            return self._trained(node, *rest)[0], None
        after = self._apply(node, step)
        return after, after.disk if step.records else None

    def _failed_by_its_place(self, node: Node, kind: str, rest: Any, worker: str) -> tuple[Node, State | None]:
        if kind == "scores":
            order_id, table, reward = rest
            after, disk = self._raised(node, order_id, table, reward, worker)
        else:
            step = transitions.order_failed(self.rules, node.state, rest[0], worker, "it raises", 0.0)
            after = self._apply(node, step)
            disk = after.disk
        if any(work.set_aside for work in after.state.work.values()):
            raise Violation(f"pictures are set aside by what fails at the place of {worker} alone")
        return after, disk

    def _raised(
        self, node: Node, order_id: str, table: str, reward: str, worker: str | None
    ) -> tuple[Node, State | None]:
        reasons = dict.fromkeys(self.rules.sizes.trajectory_ids(order_id), "it raises")
        step = transitions.pictures_failed(self.rules, node.state, reward, order_id, table, worker or "", reasons, 0.0)
        after = self._apply(node, step)
        return after, after.disk if step.records else None

    def _learns(self, node: Node) -> Iterator[tuple[Node, State | None]]:
        if node.job is None:
            step = transitions.take(self.rules, node.state, "learner", 0.0)
            if step.answer is None:
                return
            weights = node.weights
            if weights is None or len(weights) - 1 != step.answer:  # a new learner, or one that missed a version
                weights = node.state.trained[-1].version.digest
            job = self._job(node.state, step.answer, node.ghosts)
            yield self._apply(node, step)._replace(job=job, weights=weights), None
        else:
            assert node.weights is not None
            after, answer = self._trained(node, node.weights, node.job)
            after = after._replace(job=None, weights=answer or node.weights)  # refused: the work is dropped
            yield after, after.disk if after.disk is not node.disk else None

    def _job(self, state: State, batch: int, ghosts: frozenset[Any]) -> Any:
        rows = tuple((o, work_of(state, o)) for o in self.rules.sizes.batch_orders(batch))
        rivals = [ghost for ghost in ghosts if ghost[0] == "trained" and ghost[2][0] == batch]
        return batch, state.rosters.get(batch, ""), rows, LETTERS[len(rivals)]

    def _trained(self, node: Node, weights: str, job: Any) -> tuple[Node, str | None]:
        """The learner's call, or a dead one's. Its answer is the weights that count, None if it was refused."""
        batch, roster, rows, letter = job
        version = Version(batch + 1, weights + letter)
        try:
            offered = Trained(version, version.digest, version.digest, roster)
            step = transitions.trained(self.rules, node.state, batch, offered, 0.0)
        except Refused:
            return node, None
        if step.records:
            self._check_batch(node.state, batch, version, rows)
        after = self._apply(node, step)
        told = frozenset(pair for pair in node.told if pair[0] in after.state.work)
        claims = frozenset(pair for pair in node.claims if pair[0] in after.state.work)
        ghosts = frozenset(ghost for ghost in node.ghosts if not self._too_late(after.state, ghost))
        return after._replace(told=told, claims=claims, ghosts=ghosts), step.answer.recovery_point

    def _too_late(self, state: State, ghost: Any) -> bool:
        """Calls for what is long over; the search is small only if it lets go of them."""
        if ghost[0] == "trained":
            return ghost[2][0] < state.next_batch - 1
        return self.rules.closed(state, ghost[1])

    def _check_batch(self, state: State, batch: int, version: Version, rows: Any) -> None:
        if batch != state.next_batch:
            raise Violation(f"batch {batch} trained after {state.next_batch} batches")
        parent = state.trained[batch].version
        if version.digest[:-1] != parent.digest:
            raise Violation(f"{version} was not trained from {parent}, which counts")
        for order_id, work in rows:
            if len(work.set_aside) == self.rules.sizes.order_size:
                continue
            journaled = work_of(state, order_id)
            if (journaled.rollout, journaled.scores) != (work.rollout, work.scores):
                raise Violation(f"{order_id} was trained on other rows than the journal has")
            if work.rollout is None or work.rollout.latents is None or not work.scores:
                raise Violation(f"{order_id} was trained without trajectories or scores")
            pictures, latents = (file.digest for file in work.rollout)
            if latents != f"path of {pictures}":
                raise Violation(f"{order_id} was trained on the {latents} and scores of {pictures}")
            made_from = pictures.split("@")[1].split(".")[0]
            if len(made_from) - 1 < batch - self.rules.max_staleness:
                raise Violation(f"{order_id} was made at version {len(made_from) - 1} and trained at {batch}")
            if work.version is None or made_from != work.version.digest:
                raise Violation(f"{order_id} is bound to {work.version} and was made by {made_from}")
            if state.trained[work.version.number].version != work.version:
                raise Violation(f"{order_id} is of {work.version}, which is not in this line of weights")
            if work.scores[0].file.digest != f"of {pictures}":
                raise Violation(f"{order_id} was trained on {pictures} with scores {work.scores[0].file}")

    # ---- faults

    def _died(self, node: Node, place: int, job: Any) -> Node:
        """A worker dies and another takes its place; its last call may still arrive."""
        after = self._apply(node, transitions.worker_died(self.rules, node.state, NAMES[place], "work", 0.0))
        ghosts = node.ghosts | {job} if job is not None else node.ghosts
        return _all_ask(after._replace(workers=_put(node.workers, place, None), ghosts=ghosts))

    def _hangs(self, node: Node, place: int, job: Any) -> Node:
        old = Hold(NAMES[place], -3 * TIMEOUT)
        state = node.state._replace(
            claims={o: _aged(holds, old) for o, holds in node.state.claims.items()},
            leases={key: _aged(holds, old) for key, holds in node.state.leases.items()},
        )
        return _all_ask(node._replace(state=state, workers=_put(node.workers, place, ("hung", job))))

    def _restart(self, node: Node) -> Node:
        """The buffer starts anew from its journal; workers and learner live on with what they hold."""
        step = transitions.reopen(self.rules, restarted(node.disk))
        return _all_ask(node._replace(state=step.state, disk=restarted(step.state)))

    # ---- the journal

    def _apply(self, node: Node, step: Step) -> Node:
        if not step.records:
            return _all_ask(node._replace(state=step.state))
        disk = node.disk
        for record in self.journaled(step):
            disk = fold(disk, record)
        self._check_kept(node.disk, disk, step)
        return _all_ask(node._replace(state=step.state, disk=restarted(disk)))

    def _check_kept(self, before: State, after: State, step: Step) -> None:
        """What is acknowledged stays: versions, tables of untrained batches, and recovery points still needed."""
        if after.trained[: len(before.trained)] != before.trained:
            raise Violation(f"{before.trained[-1]} was trained, and is now {after.trained[-1]}")
        if any(record["kind"] == "again" for record in step.records):
            return
        for order_id, work in before.work.items():
            gone = work.rollout is not None and work_of(after, order_id).rollout != work.rollout
            if gone and not self.rules.closed(after, order_id):
                raise Violation(f"{work.rollout} of {order_id} was acknowledged, and is gone")


def _all_ask(node: Node) -> Node:
    """Who has nothing to do asks every few seconds, so all are known to be at work, but for those that hang."""
    asked = {
        (role, name): -3 * TIMEOUT if job is not None and job[0] == "hung" else 0.0
        for role in ("", REWARD, "taste")
        for name, job in zip(NAMES, node.workers, strict=True)
    }
    return node._replace(state=node.state._replace(asked=asked))


def _put(pair: tuple[Any, Any], place: int, value: Any) -> tuple[Any, Any]:
    return (value, pair[1]) if place == 0 else (pair[0], value)


def _aged(holds: tuple[Hold, ...], old: Hold) -> tuple[Hold, ...]:
    return tuple(old if hold.worker == old.worker else hold for hold in holds)
