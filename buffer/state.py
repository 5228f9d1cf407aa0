"""The buffer's state: plain data, and the fold of journal records into it.

The state machine is three things: this data, the decisions in `rules.py` (one small method a rule of docs/buffer.md),
and the transitions in `transitions.py`. A transition is a pure function of the state and what was called, with the time
as an argument. It gives a `Step`: the new state, the records to journal *before* anybody hears the answer, and the
answer. No file, no clock, no Ray.

The durable part changes only by `fold`, so the state after a restart is the fold of the journal. What is not durable
(claims, leases, who has taken the batch, what is published, deaths) starts empty in every epoch: it all goes back.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from buffer.orders import Evaluation, OrderName, Version, parse

Record = dict[str, Any]  # one fact in the journal; JSON, with its "kind"


class File(NamedTuple):
    """A file that was acknowledged: its path in the run folder and the sha256 (16 characters) of its bytes."""

    path: str
    digest: str


class Rollout(NamedTuple):
    """The files of one order's trajectories. Both count or none does, and if either is damaged, both are made again."""

    images: File  # trajectory_id, image
    latents: File | None  # trajectory_id and the path; None of an evaluation, for which nothing is trained


class Score(NamedTuple):
    """One reward's scores of one order; they count for the pictures with this digest and no other."""

    reward: str
    images: str
    file: File


class Work(NamedTuple):
    """What has become of one order."""

    version: Version | None = None  # bound by the first claim, for good
    rollout: Rollout | None = None
    scores: tuple[Score, ...] = ()
    failures: tuple[tuple[tuple[str, int | None], tuple[str, ...]], ...] = ()  # ((reward, trajectory id), or ("", None)
    # for the rollout; where: the place of the worker, once for each time)
    set_aside: tuple[tuple[int, str], ...] = ()  # (trajectory id, reason)
    claimed: float = 0.0  # times, in seconds since 1970: for people, nothing is decided by them
    rolled_out: float = 0.0
    scored: float = 0.0
    newest: int = 0  # version when the last score came: how much of the age passed in flight


class Trained(NamedTuple):
    """One version: the weights, their recovery point, and the rows they were trained on."""

    version: Version
    recovery_point: str  # path in the run folder
    parquet: str  # the same; empty for version 0
    roster: str


class Hold(NamedTuple):
    """Somebody's claim or lease."""

    worker: str
    since: float


class State(NamedTuple):
    """Everything. The dicts are never changed in place."""

    # durable: the fold of the journal
    epoch: int = 0
    trained: tuple[Trained, ...] = ()  # place v holds version v; the first is registered by the learner at the start
    work: Mapping[str, Work] = {}  # order id -> its life, until retention drops it
    rosters: Mapping[int, str] = {}  # batches that are ready and not yet trained -> digest of what they will train on
    evaluations: Mapping[Evaluation, str | None] = {}  # what is over -> its Parquet file, or None: missed
    set_aside: Mapping[str, int] = {}  # reason -> pictures, of trained batches and of evaluations that are over
    # of this epoch
    published: frozenset[int] = frozenset()
    claims: Mapping[str, tuple[Hold, ...]] = {}  # order id -> who is rolling it out
    leases: Mapping[tuple[str, str], tuple[Hold, ...]] = {}  # (order id, reward) -> who is scoring it
    alone: Mapping[str, int] = {}  # worker -> the picture it is trying alone right now
    taken: Hold | None = None  # the learner that has the next batch
    deaths: Mapping[tuple[str, str], int] = {}  # (order id or batch, reward or "") -> workers it has cost
    asked: Mapping[tuple[str, str], float] = {}  # (reward or "" for rollouts, place of a worker) -> when, last

    @property
    def next_batch(self) -> int:
        """The batch to train next, which is also the newest version's number (-1 before version 0 is there)."""
        return len(self.trained) - 1


class Step(NamedTuple):
    """What a transition gives: the new state, what to journal before the answer is shown, and the answer."""

    state: State
    records: tuple[Record, ...] = ()
    answer: Any = None


NOTHING_YET = Work()


def work_of(state: State, order_id: str) -> Work:
    return state.work.get(order_id, NOTHING_YET)


def place_of(worker: str) -> str:
    """What of a worker's name stays when another takes its place: "sampler-0" of "sampler-0.3"."""
    return worker.rpartition(".")[0] or worker


def without(mapping: Mapping[Any, Any], *keys: Any) -> dict[Any, Any]:
    return {key: value for key, value in mapping.items() if key not in keys}


def restarted(state: State) -> State:
    """The same run in a new epoch: what is durable."""
    return State(*state[:6])


def fold(state: State, record: Record) -> State:
    """Apply one record of the journal."""
    return FOLDS[record["kind"]](state, record)


def record_all(state: State, *records: Record) -> Step:
    """Fold the records into the state and hand them on to be journaled."""
    for record in records:
        state = fold(state, record)
    return Step(state, records)


def restored_record(state: State) -> Record:
    """What a mirror keeps of the state: all that was trained and evaluated. Of orders beyond it nothing."""
    return {
        "kind": "restored",
        "trained": state.trained,
        "evaluations": [[*evaluation, parquet] for evaluation, parquet in state.evaluations.items()],
        "set_aside_in_trained": dict(state.set_aside),
    }


def _change(state: State, order_id: str, **fields: Any) -> State:
    return state._replace(work={**state.work, order_id: work_of(state, order_id)._replace(**fields)})


def _opened(state: State, record: Record) -> State:
    return restarted(state)._replace(epoch=record["epoch"])


def _restored(state: State, record: Record) -> State:
    """A new head's first record; orders that were bound, and versions that only they used, are as if never claimed."""
    return state._replace(
        trained=tuple(Trained(Version(*version), *rest) for version, *rest in record["trained"]),
        evaluations={Evaluation(version, name): parquet for version, name, parquet in record["evaluations"]},
        set_aside=record["set_aside_in_trained"],
    )


def _reopened(state: State, record: Record) -> State:
    """Pictures set aside get another chance. Their orders' scores go: they may have left these pictures out."""
    for order_id in record["orders"]:
        work = work_of(state, order_id)
        again = {trajectory_id for trajectory_id, _ in work.set_aside}
        failures = tuple((key, places) for key, places in work.failures if key[1] is not None and key[1] not in again)
        state = _change(state, order_id, set_aside=(), failures=failures, scores=())
        state = state._replace(rosters=without(state.rosters, _batch(order_id)))
    return state


def _claimed(state: State, record: Record) -> State:
    return _change(state, record["order"], version=Version(*record["version"]), claimed=float(record["time"]))


def _rolled_out(state: State, record: Record) -> State:
    rollout = Rollout(File(*record["images"]), File(*record["latents"]) if record["latents"] else None)
    return _change(state, record["order"], rollout=rollout, rolled_out=float(record["time"]))


def _failed(state: State, record: Record) -> State:
    """An exception in an order's rollout, or of single pictures in a reward."""
    failures = dict(work_of(state, record["order"]).failures)
    for picture in record.get("pictures", [None]):
        key = record.get("reward", ""), picture
        failures[key] = (*failures.get(key, ()), place_of(record["worker"]))
    return _change(state, record["order"], failures=tuple(failures.items()))


def _set_aside(state: State, record: Record) -> State:
    known = dict(work_of(state, record["order"]).set_aside)
    known.update(dict.fromkeys(record["pictures"], record["reason"]))
    return _change(state, record["order"], set_aside=tuple(sorted(known.items())))


def _scored(state: State, record: Record) -> State:
    work = work_of(state, record["order"])
    score = Score(record["reward"], record["table"], File(record["path"], record["digest"]))
    others = tuple(other for other in work.scores if other.reward != score.reward)
    scores = tuple(sorted((*others, score)))
    newest = state.next_batch
    return _change(state, record["order"], scores=scores, scored=float(record["time"]), newest=newest)


def _again(state: State, record: Record) -> State:
    """An acknowledged file is damaged: the order is rolled out again at the version it is bound to; its scores stay and
    count if the new pictures have the old ones' digest. A damaged file of scores is only scored again."""
    order_id, work = record["order"], work_of(state, record["order"])
    if reward := record.get("reward"):
        state = _change(state, order_id, scores=tuple(score for score in work.scores if score.reward != reward))
    else:
        state = _change(state, order_id, rollout=None)
    batch = _batch(order_id)
    taken = None if batch == state.next_batch else state.taken
    return state._replace(rosters=without(state.rosters, batch), taken=taken)


def _ready(state: State, record: Record) -> State:
    return state._replace(rosters={**state.rosters, record["batch"]: record["roster"]})


def _trained(state: State, record: Record) -> State:
    trained = Trained(Version(*record["version"]), record["recovery_point"], record["parquet"], record["roster"])
    return state._replace(
        trained=(*state.trained, trained),
        rosters=without(state.rosters, record["batch"]),
        set_aside=_with_those_of(state, lambda name: not name.evaluation and name.group == record["batch"]),
        taken=None,
        claims={order: holds for order, holds in state.claims.items() if _batch(order) != record["batch"]},
        leases={key: holds for key, holds in state.leases.items() if _batch(key[0]) != record["batch"]},
    )


def _evaluated(state: State, record: Record) -> State:
    return _over(state, Evaluation(*record["evaluation"]), record["parquet"])


def _over(state: State, evaluation: Evaluation, parquet: str | None) -> State:
    aside = _with_those_of(state, lambda name: name.evaluation == evaluation not in state.evaluations)
    return state._replace(evaluations={**state.evaluations, evaluation: parquet}, set_aside=aside)


def _with_those_of(state: State, ends: Callable[[OrderName], bool]) -> dict[str, int]:
    """What was set aside so far, with that of orders that are over with this record: retention may forget them."""
    aside = Counter(state.set_aside)
    for order_id, work in state.work.items():
        if ends(parse(order_id)):
            aside.update(reason for _, reason in work.set_aside)
    return dict(aside)


def _missed(state: State, record: Record) -> State:
    over = Evaluation(*record["evaluation"])
    return _over(state, over, None)._replace(
        claims={order: holds for order, holds in state.claims.items() if parse(order).evaluation != over},
        leases={key: holds for key, holds in state.leases.items() if parse(key[0]).evaluation != over},
    )


def _dropped(state: State, record: Record) -> State:
    return state._replace(work=without(state.work, *record["orders"]))


FOLDS: dict[str, Callable[[State, Record], State]] = {
    "opened": _opened,
    "restored": _restored,
    "reopened": _reopened,
    "claimed": _claimed,
    "rolled_out": _rolled_out,
    "failed": _failed,
    "set_aside": _set_aside,
    "scored": _scored,
    "again": _again,
    "ready": _ready,
    "trained": _trained,
    "evaluated": _evaluated,
    "missed": _missed,
    "dropped": _dropped,
}


def _batch(order_id: str) -> int | None:
    name = parse(order_id)
    return None if name.evaluation else name.group
