"""Who holds the run up, which count to raise, and what throughput to expect of it.

Measured are the seconds that each worker spent on each of its occupations over the last batches (`Window`; loading a
model does not count). The seconds that a role works for one batch, divided by the orders of a batch, are what one order
costs it. The model is the pipeline itself, with these costs for every order (`seconds_per_batch`): with R, W and L for
rolling out an order, scoring it and training a batch, n samplers, m actors of each reward, k = buffer.max_staleness,

    rolled out  r_i = max(r_{i-n}, t_{u-k}) + R          order i of batch u goes to the sampler that is free first, once
                                                         version u - k is there
    scored      s_i = max(r_i, s_{i-m}) + W              for each reward by itself
    trained     t_{u+1} = max(t_u, all s_i of batch u) + L          t_v is when version v is there

and batches come at the pace at which t grows. With k = 0 nothing overlaps across batches: about N R/n + W + L a batch
of N orders where rollouts are slower than rewards, R + N W/m + L where they are not. With enough staleness it is the
slowest role's time alone, max(N R/n, N W/m, L). What the model does not know (publishing, uneven orders) is what the
measured batches took longer than it says; that is added to what it says of other counts.

It takes for granted that one more actor of a reward has hardware of its own, and that N ranks of the learner train N
times as fast as one. Samplers and learner without a GPU compute on the cluster's cores (`Cores`): where the threads of
those that compute at once would be more than these, one more of them gains nothing, and is not advised.
"""

import itertools
import math
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from conf.evaluations import trained_rewards
from conf.schema import Config

Seconds = Mapping[str, float]  # by occupation

LEAST_BATCHES = 3  # measured, before anything is advised
MOST_BATCHES = 10  # that the window goes back
WORTHWHILE = 1.05  # times the throughput now, to be called a gain
MOST_RAISED = 20  # how many more actors of one role are thought of
STALENESS = "buffer.max_staleness"


@dataclass(frozen=True)
class Cores:
    """What samplers and learner compute on where they have no GPU."""

    of_the_cluster: float = math.inf
    threads: Mapping[str, int] = field(default_factory=dict)  # of one actor, for each role that computes on them


@dataclass(frozen=True)
class Pipeline:
    """What decides the pace. Roles are named by their settings: "samplers", "rewards.aesthetic", "learner"."""

    counts: dict[str, int]  # actors of each role
    work: dict[str, float]  # seconds that the role works for one batch, all its actors together
    batch_size: int
    orders: int  # of one batch
    max_staleness: int
    cores: Cores

    @property
    def bottleneck(self) -> str:
        """The role whose actors have most to do."""
        return max(self.work, key=lambda role: self.work[role] / self.counts[role])

    def capacity(self, role: str) -> float:
        """Trajectories a second that the role's actors could do if they never waited."""
        return self.batch_size * self.counts[role] / self.work[role]

    @property
    def threads_at_once(self) -> int:
        """That compute on the cores. Without staleness samplers and learner take turns."""
        by_role = [self.counts[role] * threads for role, threads in self.cores.threads.items()]
        return sum(by_role) if self.max_staleness else max(by_role, default=0)

    def has_room_for(self, other: "Pipeline") -> bool:
        """Whether the cores carry `other`, or it takes no more of them than this one does."""
        return other.threads_at_once <= max(self.cores.of_the_cluster, self.threads_at_once)

    def raised(self, settings: tuple[str, ...]) -> "Pipeline":
        """With one more of each."""
        counts = {role: count + (role in settings) for role, count in self.counts.items()}
        return replace(self, counts=counts, max_staleness=self.max_staleness + (STALENESS in settings))


@dataclass(frozen=True)
class Advice:
    pipeline: Pipeline  # as it is
    better: Pipeline  # as it should be
    now: float  # trajectories a second, measured
    expected: float  # the same, of `better`
    waiting: dict[str, float]  # share of its time that each role waited, 0 to 1
    waits_for: dict[str, str]  # whom each role waited for most, of those that did
    until: tuple[int, float] | None  # the count to which raising goes on to help, and what is expected then
    crowded: bool  # whether something would help if the cluster had more cores

    @property
    def raises(self) -> dict[str, tuple[int, int]]:
        """Setting -> (from, to)."""
        changed = {f"{role}.count": (n, self.better.counts[role]) for role, n in self.pipeline.counts.items()}
        changed[STALENESS] = (self.pipeline.max_staleness, self.better.max_staleness)
        return {setting: (before, after) for setting, (before, after) in changed.items() if before != after}

    @property
    def sentence(self) -> str:
        """What to do, for a person."""
        bottleneck, then = self.pipeline.bottleneck, self.better.bottleneck
        if not self.raises and self.crowded:
            has = f"{self.pipeline.cores.of_the_cluster:g}"
            return (
                f"the bottleneck is {_in_words(bottleneck)}, and all CPU cores ({has}) are taken: only more would help"
            )
        if not self.raises:
            return f"the bottleneck is {_in_words(bottleneck)}, but one more of everything would gain less than 5%"
        steps = [f"{setting} from {before} to {after}" for setting, (before, after) in self.raises.items()]
        more = f" (and {self.until[0]} about {self.until[1]:.3g})" if self.until else ""
        still = "the bottleneck is still" if then == bottleneck else "then the bottleneck is"
        return (
            f"the bottleneck is {_in_words(bottleneck)}: raise {' and '.join(steps)} for {self.now:.3g} -> about "
            f"{self.expected:.3g} trajectories/s{more}; {still} {_in_words(then)}"
        )

    def numbers(self) -> dict[str, float]:
        """For the row of a batch; docs/algorithm.md has their meaning."""
        shares = {f"waiting/{role}": share for role, share in self.waiting.items()}
        capacities = {f"capacity/{role}": self.pipeline.capacity(role) for role in self.pipeline.counts}
        return {"throughput/now": self.now, "throughput/expected": self.expected, **shares, **capacities}


def counts_of(places: Iterable[str], config: Config) -> dict[str, int]:
    """Actors of each role that batches wait for, from the names of all places: a reward that only measures holds up
    nobody."""
    waited_for = {"samplers", *(f"rewards.{name}" for name in trained_rewards(config))}
    counts = Counter(role for place in places if (role := role_of(place)) in waited_for)
    return {**counts, "learner": config.learner.count}  # ranks, which share one place


def seconds_per_batch(pipeline: Pipeline) -> float:
    """What a batch takes by the model above, in its steady state."""
    costs = {role: seconds / pipeline.orders for role, seconds in pipeline.work.items() if role != "learner"}
    rollout = costs.pop("samplers")
    learning = pipeline.work["learner"] / pipeline.counts["learner"]
    samplers = deque([0.0] * pipeline.counts["samplers"])  # when each is free, the next one first
    pools = {role: deque([0.0] * pipeline.counts[role]) for role in costs}
    versions = [0.0]
    for batch in range(40):
        ready = versions[-1]
        for _ in range(pipeline.orders):
            admitted = versions[max(0, batch - pipeline.max_staleness)]
            rolled_out = max(samplers.popleft(), admitted) + rollout
            samplers.append(rolled_out)
            for role, pool in pools.items():
                scored = max(pool.popleft(), rolled_out) + costs[role]
                pool.append(scored)
                ready = max(ready, scored)
        versions.append(ready + learning)
    return (versions[-1] - versions[10]) / 30


def advise(
    seconds: Mapping[str, Seconds],
    elapsed_s: float,
    batches: int,
    counts: Mapping[str, int],
    batch_size: int,
    order_size: int,
    max_staleness: int,
    cores: Cores,
) -> Advice | None:
    """From what the workers did while `batches` batches were trained in `elapsed_s` seconds. None: too little is known.

    seconds: of each worker ("sampler-0.1", "reward-aesthetic-0.0") by occupation. counts: actors of each role.
    """
    work: dict[str, float] = defaultdict(float)
    waited: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for worker, occupations in seconds.items():
        for occupation, spent in occupations.items():
            # Waiting for somebody names whom; "waiting for the buffer" or other ranks is part of what work costs.
            if occupation.startswith("waiting for") and ": " in occupation:
                waited[role_of(worker)][occupation.split(": ", 1)[1]] += spent
            elif occupation not in ("loading the model", "loading the reward"):
                work[role_of(worker)] += spent / max(batches, 1)
    if batches < LEAST_BATCHES or elapsed_s <= 0 or any(work[role] <= 0 for role in counts):
        return None
    works = {role: work[role] for role in counts}
    now = Pipeline(dict(counts), works, batch_size, batch_size // order_size, max_staleness, cores)
    unexplained = max(0.0, elapsed_s / batches - seconds_per_batch(now))

    def expected(pipeline: Pipeline) -> float:
        return batch_size / (seconds_per_batch(pipeline) + unexplained)

    better = _least_that_helps(now, expected)
    roomy = replace(now, cores=Cores())
    busy = {role: work[role] * batches for role in counts}
    return Advice(
        pipeline=now,
        better=better,
        now=batch_size * batches / elapsed_s,
        expected=expected(better),
        waiting={role: sum(waited[role].values()) / (busy[role] + sum(waited[role].values())) for role in counts},
        waits_for={role: max(whom, key=lambda one: whom[one]) for role, whom in waited.items() if whom},
        until=_until(now, better, expected),
        crowded=better is now and _least_that_helps(roomy, expected) is not roomy,
    )


def _least_that_helps(now: Pipeline, expected: Callable[[Pipeline], float]) -> Pipeline:
    """One more of one thing, whichever gains most; of two things where no single one gains; and so on. `now` itself
    if one more of everything that there is room for gains nothing."""
    settings = sorted(now.counts, key=lambda role: role == "learner")  # the learner last, where all else is equal
    settings += [STALENESS] if now.max_staleness == 0 else []
    for many in range(1, len(settings) + 1):
        raised = map(now.raised, itertools.combinations(settings, many))
        better = max(filter(now.has_room_for, raised), key=expected, default=now)
        if expected(better) >= WORTHWHILE * expected(now):
            return better
    return now


def _until(now: Pipeline, better: Pipeline, expected: Callable[[Pipeline], float]) -> tuple[int, float] | None:
    """How far the count that is to be raised could go on to rise with a gain each time, if further than by one."""
    raised = [role for role in now.counts if better.counts[role] != now.counts[role]]
    if len(raised) != 1 or better.max_staleness != now.max_staleness:
        return None
    best = better
    for _ in range(MOST_RAISED):
        further = best.raised((raised[0],))
        if not now.has_room_for(further) or expected(further) < WORTHWHILE * expected(best):
            break
        best = further
    return (best.counts[raised[0]], expected(best)) if best is not better else None


class Window:
    """What every worker did over the last batches, from the sums since its start that it reports."""

    def __init__(self) -> None:
        self.marks: deque[_Mark] = deque(maxlen=MOST_BATCHES + 1)

    def hear(self, trained: int, now_s: float, seconds: Mapping[str, Seconds], counts: Mapping[str, int]) -> None:
        """At each new version: `trained` batches are. With other counts than before, the window begins anew."""
        if self.marks and self.marks[-1].counts != counts:
            self.marks.clear()
        self.marks.append(_Mark(trained, now_s, seconds, dict(counts)))

    def read(self) -> tuple[dict[str, dict[str, float]], float, int]:
        """Seconds of each worker by occupation in the window, the window's length in seconds and in batches."""
        first, last = self.marks[0], self.marks[-1]
        spent = {
            worker: {what: total - first.seconds.get(worker, {}).get(what, 0.0) for what, total in occupations.items()}
            for worker, occupations in last.seconds.items()
        }
        return spent, last.now_s - first.now_s, last.trained - first.trained


class _Mark(NamedTuple):
    trained: int
    now_s: float
    seconds: Mapping[str, Seconds]
    counts: dict[str, int]


def role_of(worker: str) -> str:
    """The role of "reward-aesthetic-0.1" is "rewards.aesthetic"."""
    place = worker.rsplit("-", 1)[0]
    return f"rewards.{place.removeprefix('reward-')}" if place.startswith("reward-") else _PLURAL.get(place, place)


_PLURAL = {"sampler": "samplers"}


def _in_words(role: str) -> str:
    return f"reward {role.removeprefix('rewards.')}" if role.startswith("rewards.") else f"the {role}"
