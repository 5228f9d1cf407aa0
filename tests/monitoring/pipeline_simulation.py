"""The real state machine of the buffer with workers that only take time: an event simulation, the judge of the advice.

No Ray, no clock: `simulate` goes from event to event. Workers work, wait and account for it as the real ones do.
"""

import heapq
import itertools
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from buffer import transitions
from buffer.orders import Sizes, Version
from buffer.rules import Rules
from buffer.state import File, Rollout, State, Trained
from buffer.watching import learner_waits_for, reward_waits_for, sampler_waits_for

ORDER_SIZE = 4


@dataclass(frozen=True)
class Durations:
    """Seconds of one order or batch; each single one differs by up to `spread` of it, by chance."""

    rollout: float
    rewards: dict[str, float]
    learning: float
    spread: float = 0.0


@dataclass(frozen=True)
class Simulated:
    times: list[float]  # times[v] is when version v was there
    seconds: list[dict[str, dict[str, float]]]  # seconds[v]: what every worker had reported by then

    def throughput(self, first: int, last: int, orders: int) -> float:
        """Trajectories a second between two versions."""
        return (last - first) * orders * ORDER_SIZE / (self.times[last] - self.times[first])


def simulate(
    durations: Durations, counts: dict[str, int], orders: int, max_staleness: int, batches: int, seed: int = 0
) -> Simulated:
    rules = Rules(
        Sizes(orders * ORDER_SIZE, ORDER_SIZE, ()),
        tuple(durations.rewards),
        batches,
        max_staleness,
        claim_timeout_s=1e9,
        lease_timeouts=dict.fromkeys(durations.rewards, 1e9),
    )
    random = np.random.default_rng(seed)
    state, now, serial = State(), 0.0, itertools.count()
    events: list[tuple[float, int, str, str, Any]] = []  # when, tie-breaker, worker, its occupation so far, what it did
    spent: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    reported: dict[str, dict[str, float]] = {}
    idle: dict[str, float] = {}  # worker -> since when it waits, for what it has waited since the last change
    times, snapshots = [], []

    def do(step: Any) -> Any:
        nonlocal state
        state = step.state
        return step.answer

    def version(number: int) -> Version:
        return Version(number, f"w{number}")

    def trained(number: int, roster: str) -> None:
        do(transitions.trained(rules, state, number - 1, Trained(version(number), "point", "rows", roster), now))
        do(transitions.publish(rules, state, version(number)))
        times.append(now)
        snapshots.append({worker: dict(seconds) for worker, seconds in reported.items()})

    def seek(worker: str) -> bool:
        """The worker asks for work; whether it got some."""
        role = worker.rsplit("-", 1)[0]
        if role == "sampler":
            job, seconds, doing = do(transitions.claim(rules, state, worker, now)), durations.rollout, "rolling out"
        elif role == "learner":
            job, seconds, doing = do(transitions.take(rules, state, worker, now)), durations.learning, "training"
        else:
            reward = role.removeprefix("reward-")
            job = do(transitions.lease(rules, state, reward, worker, now))
            seconds, doing = durations.rewards[reward], "scoring"
        if job is None:
            return False
        taken = seconds * (1 + durations.spread * random.uniform(-1, 1))
        heapq.heappush(events, (now + taken, next(serial), worker, doing, (job, taken)))
        return True

    def account(until: float) -> None:
        """All who wait have waited until then, for what the state lacks."""
        whom: dict[str, Callable[[Rules, State], str]] = {"sampler": sampler_waits_for, "learner": learner_waits_for}
        what = {"sampler": "orders", "learner": "batches"}
        for worker, since in idle.items():
            role = worker.rsplit("-", 1)[0]
            cause = whom.get(role, reward_waits_for)(rules, state)
            spent[worker][f"waiting for {what.get(role, 'pictures')}: {cause}"] += until - since
            idle[worker] = until

    trained(0, "")
    names = [f"sampler-{i}" for i in range(counts["samplers"])] + ["learner-0"]
    names += [f"reward-{r}-{i}" for r in durations.rewards for i in range(counts[f"rewards.{r}"])]
    idle.update(dict.fromkeys(names, 0.0))
    while not rules.finished(state):
        for worker in [worker for worker in idle if seek(worker)]:
            del idle[worker]
        later, _, worker, doing, (job, taken) = heapq.heappop(events)
        account(later)
        now = later
        spent[worker][doing] += taken
        reported[worker] = spent[worker]
        if doing == "rolling out":
            order_id, bound = job
            do(transitions.add(rules, state, order_id, bound, Rollout(File(order_id, order_id), None), now))
        elif doing == "scoring":
            reward = worker.rsplit("-", 1)[0].removeprefix("reward-")
            do(transitions.add_scores(rules, state, reward, job[0], job[1].digest, File("", reward + job[0]), now))
        else:
            trained(job + 1, state.rosters[job])
        idle[worker] = now
    return Simulated(times, snapshots)
