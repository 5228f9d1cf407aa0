"""Who waits for whom, and the advice that follows from it, judged by an event simulation of the real state machine."""

import asyncio
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from actors.buffer_actor import BufferActor
from buffer import watching
from buffer.protocol import TakenBatch
from buffer.rows import Combination
from conf.load import load
from monitoring.advice import Advice, Cores, Pipeline, Window, advise, counts_of, role_of, seconds_per_batch
from tests.buffer_toy import ONE_REWARD, PLAN, buffer, publish, roll_out, rolled_out, rules, score, scored, start, train
from tests.monitoring.pipeline_simulation import ORDER_SIZE, Durations, Simulated, simulate

COUNTS = {"samplers": 1, "rewards.a": 1, "learner": 1}
MANY = Cores()


def advice_of(
    run: Simulated, counts: dict[str, int], orders: int, k: int, first: int, last: int, cores: Cores = MANY
) -> Advice | None:
    """As the driver does it, from one version to another."""
    window = Window()
    for version in range(first, last + 1):
        window.hear(version, run.times[version], run.seconds[version], counts)
    return advise(*window.read(), counts, orders * ORDER_SIZE, ORDER_SIZE, k, cores)


def test_a_reward_that_only_measures_holds_up_nobody() -> None:
    config = load(["compressibility"])  # with clip and judge, which no batch waits for
    places = ["sampler-0", "sampler-1", "reward-compressibility-0", "reward-clip-0", "reward-judge-0", "learner-0"]
    assert counts_of(places, config) == {"samplers": 2, "rewards.compressibility": 1, "learner": 1}


seconds = st.floats(0.2, 3.0)


@pytest.mark.long
@given(
    durations=st.builds(
        Durations, seconds, st.fixed_dictionaries({"a": seconds, "b": seconds}), st.floats(0.4, 12.0), st.just(0.2)
    ),
    counts=st.fixed_dictionaries(
        {
            "samplers": st.integers(1, 4),
            "rewards.a": st.integers(1, 3),
            "rewards.b": st.integers(1, 3),
            "learner": st.just(1),
        }
    ),
    orders=st.integers(4, 8),
    k=st.integers(0, 2),
)
@settings(max_examples=40, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
def test_the_expected_throughput_is_what_the_simulation_then_does(
    durations: Durations, counts: dict[str, int], orders: int, k: int
) -> None:
    """Once the pipeline is full: until then who runs ahead does more than a batch for each batch that is trained."""
    run = simulate(durations, counts, orders, k, batches=20 + k)
    advice = advice_of(run, counts, orders, k, first=10, last=20)
    assert advice is not None and advice.raises
    assert advice.now == pytest.approx(run.throughput(10, 20, orders))
    better = replace(durations, learning=durations.learning / advice.better.counts["learner"])
    k = advice.better.max_staleness
    again = simulate(better, advice.better.counts, orders, k, batches=20 + k, seed=1).throughput(4, 20, orders)
    assert advice.expected == pytest.approx(again, rel=0.13)
    assert again > advice.now


@pytest.mark.parametrize(
    ("durations", "k", "sentence"),
    [
        (
            Durations(1.0, {"a": 0.7}, 0.5),
            1,
            "the bottleneck is the samplers: raise samplers.count from 1 to 2 for 4 -> about 5.71 trajectories/s; "
            "then the bottleneck is reward a",
        ),
        (
            Durations(0.5, {"a": 2.0}, 0.5),
            1,
            "the bottleneck is reward a: raise rewards.a.count from 1 to 2 for 2 -> about 4 trajectories/s "
            "(and 4 about 7.11); the bottleneck is still reward a",
        ),
        (
            Durations(1.0, {"a": 0.1}, 3.9),
            0,
            "the bottleneck is the samplers: raise buffer.max_staleness from 0 to 1 for 2 -> about 4 trajectories/s; "
            "the bottleneck is still the samplers",
        ),
        (
            Durations(0.5, {"a": 0.5}, 8.0),
            1,
            "the bottleneck is the learner: raise learner.count from 1 to 2 for 2 -> about 4 trajectories/s",
        ),
    ],
)
def test_the_sentence_says_what_to_raise(durations: Durations, k: int, sentence: str) -> None:
    advice = advice_of(simulate(durations, COUNTS, 4, k, 12 + k), COUNTS, 4, k, 2, 12)
    assert advice is not None and advice.sentence.startswith(sentence), advice and advice.sentence


def test_two_roles_that_are_equally_slow_are_raised_together() -> None:
    advice = advice_of(simulate(Durations(1.0, {"a": 1.0}, 0.5), COUNTS, 4, 2, 14), COUNTS, 4, 2, 2, 12)
    assert advice is not None
    assert advice.raises == {"samplers.count": (1, 2), "rewards.a.count": (1, 2)}


@pytest.mark.parametrize(
    ("k", "threads", "cores", "raises"),
    [
        # They take turns, so each may have all the cores: a second sampler needs more where the first has two threads.
        (0, {"samplers": 2, "learner": 2}, 2, {}),
        (0, {"samplers": 1, "learner": 2}, 2, {"samplers.count": (1, 2)}),
        (0, {"samplers": 2, "learner": 2}, 4, {"samplers.count": (1, 2)}),
        # They compute at once.
        (1, {"samplers": 1, "learner": 1}, 2, {}),
        (1, {"samplers": 1, "learner": 1}, 3, {"samplers.count": (1, 2)}),
        # A sampler with a GPU of its own needs no core.
        (1, {"learner": 2}, 2, {"samplers.count": (1, 2)}),
    ],
)
def test_what_the_cores_do_not_carry_is_not_advised(
    k: int, threads: dict[str, int], cores: int, raises: dict[str, tuple[int, int]]
) -> None:
    run = simulate(Durations(1.0, {"a": 0.05}, 1.0), COUNTS, 4, k, 12 + k)
    advice = advice_of(run, COUNTS, 4, k, 2, 12, Cores(cores, threads))
    assert advice is not None and advice.raises == raises
    assert raises or advice.sentence == (
        f"the bottleneck is the samplers, and all CPU cores ({cores}) are taken: only more would help"
    )


def test_full_cores_keep_no_reward_from_being_raised_nor_a_crowd_from_staying() -> None:
    """A reward may wait for a service. And who has more threads than cores already is told of what costs no more."""
    run = simulate(Durations(0.5, {"a": 2.0}, 0.5), COUNTS, 4, 1, 13)
    advice = advice_of(run, COUNTS, 4, 1, 2, 12, Cores(2, {"samplers": 4, "learner": 4}))
    assert advice is not None and advice.raises == {"rewards.a.count": (1, 2)}


def test_raising_goes_on_only_while_there_are_cores() -> None:
    run = simulate(Durations(1.0, {"a": 0.05}, 0.5), COUNTS, 8, 0, 12)
    free, bound = (advice_of(run, COUNTS, 8, 0, 2, 12, Cores(n, {"samplers": 1, "learner": 1})) for n in (64, 3))
    assert free and bound and free.raises == bound.raises == {"samplers.count": (1, 2)}
    assert free.until and bound.until and free.until[0] > 3 and bound.until[0] == 3


def test_the_model_has_its_closed_forms_at_both_ends() -> None:
    """N orders, n samplers, m reward actors that divide them: the formulas of the module's docstring."""
    rollout, scoring, learning, orders = 1.2, 0.7, 2.0, 12
    for n, m in ((1, 1), (2, 1), (3, 4), (2, 3)):
        counts = {"samplers": n, "rewards.a": m, "learner": 1}
        work = {"samplers": orders * rollout, "rewards.a": orders * scoring, "learner": learning}
        pipeline = Pipeline(counts, work, 4 * orders, orders, max_staleness=8, cores=MANY)
        slowest = max(orders * rollout / n, orders * scoring / m, learning)
        assert seconds_per_batch(pipeline) == pytest.approx(slowest, rel=0.02)
        assert min(pipeline.capacity(role) for role in counts) == pytest.approx(4 * orders / slowest)
        if n == 1 and m == 1:  # rollouts are slower
            whole = orders * rollout + scoring + learning
            assert seconds_per_batch(replace(pipeline, max_staleness=0)) == pytest.approx(whole)
        if n == 3 and m == 4:
            whole = orders * rollout / n + scoring + learning
            assert seconds_per_batch(replace(pipeline, max_staleness=0)) == pytest.approx(whole)


def test_too_little_is_no_advice_and_loading_is_not_work() -> None:
    run = simulate(Durations(1.0, {"a": 0.5}, 2.0), COUNTS, 4, 1, 12)
    assert advice_of(run, COUNTS, 4, 1, 2, 4) is None
    plain = advice_of(run, COUNTS, 4, 1, 2, 8)
    late = [{worker: dict(spent) for worker, spent in moment.items()} for moment in run.seconds]
    for moment in late[5:]:
        moment["sampler-0"] |= {"loading the model": 1000.0}
    assert advice_of(replace(run, seconds=late), COUNTS, 4, 1, 2, 8) == plain
    idle = [{worker: {} if worker == "reward-a-0" else spent for worker, spent in m.items()} for m in run.seconds]
    assert advice_of(replace(run, seconds=idle), COUNTS, 4, 1, 2, 8) is None


def test_the_window_begins_anew_with_other_counts_and_takes_in_who_came_later() -> None:
    window = Window()
    for version in range(30):
        window.hear(version, 2.0 * version, {"sampler-0.0": {"rolling out": 1.5 * version}}, {"samplers": 1})
    assert window.read() == ({"sampler-0.0": {"rolling out": 15.0}}, 20.0, 10)
    window.hear(30, 60.0, {"sampler-0.0": {"rolling out": 45.0}}, {"samplers": 2})
    assert window.read()[1:] == (0.0, 0)
    both = {"sampler-0.0": {"rolling out": 46.0}, "sampler-1.0": {"rolling out": 3.0}}
    window.hear(31, 62.0, both, {"samplers": 2})
    assert window.read() == ({"sampler-0.0": {"rolling out": 1.0}, "sampler-1.0": {"rolling out": 3.0}}, 2.0, 1)


def test_roles_go_by_their_settings() -> None:
    names = ["sampler-0.3", "sampler-11", "learner-0.0", "reward-clip-score-2.1"]
    assert [role_of(name) for name in names] == ["samplers", "samplers", "learner", "rewards.clip-score"]


# ---- for whom


def waits(run: Simulated) -> dict[str, dict[str, float]]:
    """Of each worker, how long it waited for whom, from version 2 to 12."""
    found: dict[str, dict[str, float]] = defaultdict(dict)
    for worker, spent in run.seconds[12].items():
        for what, total in spent.items():
            if ": " in what:
                found[worker][what.split(": ")[1]] = total - run.seconds[2][worker].get(what, 0.0)
    return found


@pytest.mark.parametrize(
    ("durations", "k", "waiting_s"),
    [
        # a batch takes 4 rollouts, the last one's score and the training: 4 + 0.5 + 3 seconds
        (
            Durations(1.0, {"a": 0.5}, 3.0),
            0,
            {
                "sampler-0": {"scores of a": 5.0, "the learner": 30.0},
                "learner-0": {"rollouts": 40.0, "scores of a": 5.0},
                "reward-a-0": {"rollouts": 25.0, "the learner": 30.0},
            },
        ),
        # the first rollout, then the reward's 4 scores, with pictures in line for it, and the training: 0.5 + 4 + 1
        (
            Durations(0.5, {"a": 1.0}, 1.0),
            0,
            {
                "sampler-0": {"scores of a": 25.0, "the learner": 10.0},
                "learner-0": {"rollouts": 10.0, "scores of a": 35.0},
                "reward-a-0": {"rollouts": 5.0, "the learner": 10.0},
            },
        ),
        # all of them overlap, at the learner's pace of 6 seconds
        (
            Durations(1.0, {"a": 0.5}, 6.0),
            1,
            {
                "sampler-0": {"the learner": 20.0},
                "learner-0": {},
                "reward-a-0": {"rollouts": 25.0, "the learner": 15.0},
            },
        ),
    ],
)
def test_waiting_adds_up_by_cause(durations: Durations, k: int, waiting_s: dict[str, dict[str, float]]) -> None:
    found = waits(simulate(durations, COUNTS, 4, k, 16))
    for worker, causes in waiting_s.items():
        there = {cause: spent for cause, spent in found[worker].items() if spent > 1e-6}
        assert there == pytest.approx(causes), worker


def test_the_buffer_knows_what_is_missing_all_the_way(tmp_path: Path) -> None:
    b = buffer(tmp_path, batches=2, max_staleness=0)

    def causes() -> tuple[str, str, str]:
        state = b.rules, b.state
        return watching.sampler_waits_for(*state), watching.reward_waits_for(*state), watching.learner_waits_for(*state)

    assert causes()[0] == causes()[1] == watching.LEARNER  # it loads, and then registers version 0
    start(b)
    for _ in range(4):
        assert causes()[1:] == ("rollouts", "rollouts")
        roll_out(b)
        lease = b.lease("size", "r0")
        assert lease is not None
        b.worker_died("r0")
        assert causes()[2] == "scores of size"  # in line, while others are rolled out
        score(b)
    assert causes() == ("the learner",) * 3
    train(b)
    assert causes() == ("publication",) * 3
    publish(b)
    for _ in range(4):
        roll_out(b)
    assert causes() == ("the end of the run", "the end of the run", "scores of size")
    for _ in range(4):
        score(b)
    train(b)
    assert causes()[2] == "the end of the run"


def test_of_two_rewards_the_one_with_pictures_in_line_is_waited_for(tmp_path: Path) -> None:
    b = buffer(tmp_path, combination=Combination({"hue": 1.0, "size": 1.0}))
    start(b)
    for worker in ("r0", "r1", "r2"):
        roll_out(b)
        assert b.lease("hue", worker)
    assert b.lease("size", "r3") and score(b, "size") and score(b, "size")
    assert watching.learner_waits_for(b.rules, b.state) == "rollouts"  # all that is there is being scored
    b.worker_died("r3")
    assert watching.learner_waits_for(b.rules, b.state) == "scores of size"


def test_a_call_that_waits_is_told_how_long_it_waited_for_whom(tmp_path: Path) -> None:
    """The buffer actor's own accounting, moment by moment: a learner asks, and a batch comes about."""
    actor = BufferActor(tmp_path, PLAN, rules(max_staleness=0), ONE_REWARD)
    start(actor.buffer)

    async def batch() -> tuple[TakenBatch | None, dict[str, float], float]:
        clock = asyncio.get_running_loop().time
        since = clock()
        taking = asyncio.create_task(actor.take("learner-0.0", "learner-0.0", {}, 60.0))
        for _ in range(4):
            await asyncio.sleep(0.05)  # nothing is rolled out
            claim, _ = await actor.claim("sampler-0.0", {}, 60.0)
            assert claim is not None
            await actor.do("add", claim.order.order_id, claim.version, rolled_out(claim.order, claim.version))
            await asyncio.sleep(0.03)  # it lies in line
            lease, _ = await actor.lease("size", "reward-size-0.0", {}, 60.0)
            assert lease is not None
            await asyncio.sleep(0.15)  # and is scored: of the last one the learner waits for that
            await actor.do("add_scores", "size", lease.order_id, lease.table_digest, scored(lease))
        taken, waited = await taking
        return taken, waited, clock() - since

    taken, waited, elapsed = asyncio.run(batch())
    assert taken is not None and taken.batch == 0
    assert waited.keys() == {"rollouts", "scores of size"}
    assert sum(waited.values()) <= elapsed
    assert waited["rollouts"] >= 4 * 0.05 + 3 * 0.15 and waited["scores of size"] >= 4 * 0.03 + 0.15
    nothing, waited = asyncio.run(actor.claim("sampler-0.0", {}, 0.2))
    assert nothing is None and waited.keys() == {"the learner"} and waited["the learner"] >= 0.19
