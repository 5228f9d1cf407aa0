"""The driver: it tries the rewards, starts the actors, publishes versions, and writes down what happened.

    it waits for                             and then
    ──────────────────────────────────────────────────────────────────────────────────────────────────────
    a batch journaled as trained             publishes its version (puts the LoRA of its recovery point in the
                                             object store, tells the buffer) and writes its row of metrics
    a finished evaluation                    draws its grid of pictures and writes its row
    a buffer of a new epoch                  publishes again what still matters, and has it drain if that was asked
    a buffer that does not answer            says so, and waits some minutes for its disk
    a dead or overdue worker                 tells the buffer and starts another in its place
    a reason to stop, Ctrl-C, the end        ends the actors

Nothing that decides the result lives here: a driver that dies loses nothing, and the same command goes on.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorUnavailableError, RayActorError, RayError, RayTaskError

from actors.buffer_actor import BufferActor
from actors.cluster import resources
from actors.fleet import ROOM_S, Fleet, Place, why_it_died
from actors.gauges import Gauges
from actors.learner_actor import LearnerActor
from actors.placement import Options, beside_the_driver, room_for_ranks
from actors.remote_buffer import PATIENCE_S, BufferSilent, RemoteBuffer
from actors.reward_actor import RewardActor
from actors.sampler_actor import SamplerActor
from actors.travel import as_sent
from buffer.orders import Plan
from buffer.protocol import News
from buffer.run_folder import RunFolder
from buffer.settings import combination_of, rules_of
from common.errors import RunStopped, UserError
from conf import scale
from conf.evaluations import trained_rewards
from conf.resume import save_config
from conf.schema import Config, LearnerConfig, WorkerConfig
from mirror.mirroring import Mirroring
from monitoring.advice import Advice, Cores, Window, advise, counts_of
from monitoring.display import Snapshot
from monitoring.metrics import means_of
from report.record import RECORD_S, by_place, record_sitting
from workers.publisher import Publisher

POLL_S = 1.0
SILENT_S = 15.0  # without an answer, and it is said


@contextmanager
def _stops_without_a_buffer() -> Iterator[None]:
    """For what calls the buffer: the only actor whose death shows there, as all others are the fleet's to see."""
    try:
        yield
    except RayActorError as error:
        raise RunStopped(f"the buffer died and did not come back: {_last_line(error)}") from error
    except BufferSilent as error:
        raise RunStopped(f"{error}: does the disk of the run folder hang? Start again once that is mended") from error


class Driver:
    """One run, from the first actor to the last. A context manager: it ends the actors that it started."""

    def __init__(self, config: Config, run_dir: Path, plan: Plan, mirroring: Mirroring) -> None:
        # An actor on the cluster works in a folder of its own, where a relative path would mean another place.
        where = dataclasses.replace(config.run, dir=str(Path(config.run.dir).absolute()))
        self.config = dataclasses.replace(config, run=where)
        self.run_dir = run_dir.absolute()
        self.plan = plan
        self.mirroring = mirroring
        self.learner_options = room_for_ranks(config.learner)
        self.rewards: dict[str, ActorHandle[Any]] = {}  # tried, by place
        self.seconds: dict[str, dict[str, float]] = {}  # of every worker of this start, by occupation
        self.recorded = -math.inf  # when run.json was written last
        self.window = Window()
        self.advice: Advice | None = None
        self.draining = False
        self.closing = ExitStack()
        self.polled: ray.ObjectRef[News] | None = None  # the news that are on their way
        self.asked_at = 0.0  # when they were asked for

    def __enter__(self) -> "Driver":
        return self

    def __exit__(self, *_: object) -> None:
        for actor in self.rewards.values():
            ray.kill(actor, no_restart=True)
        self.closing.close()

    def try_rewards(self, image_size: tuple[int, int], say: Callable[[str], None]) -> None:
        """Starts an actor of each reward and tries it on two pictures, and says so where one takes long. Raises
        UserError for one that is no good."""
        for name in self.config.rewards:
            (self.rewards[f"reward-{name}-0"],) = self._reward(name)(f"reward-{name}-0.0")
        prompts = list(self.plan.prompts)
        trials: dict[Any, str] = {
            actor.prepare.remote(prompts, image_size): place for place, actor in self.rewards.items()
        }
        while trials:
            tried, _ = ray.wait(list(trials), timeout=ROOM_S)
            if not tried:
                say(f"{', '.join(trials.values())}: still loading, or without room in the cluster; Ctrl-C ends the run")
            for trial in tried:
                self._hear(trials.pop(trial), trial)

    def _hear(self, place: str, trial: ray.ObjectRef[str | None]) -> None:
        try:
            problem = ray.get(trial)
        except RayTaskError:
            raise  # not a reward's fault: what a reward raises is a problem in words
        except RayError as error:
            raise UserError(f"{place} died while it was tried: {why_it_died(error)}") from error
        if problem:
            raise UserError(problem)

    @_stops_without_a_buffer()
    def start(self) -> None:
        """Starts the buffer and the workers. Raises UserError when the run folder's journal is no good."""
        actor = _remote(BufferActor, "buffer", max_restarts=-1, where=beside_the_driver()).remote(
            self.run_dir, self.plan, rules_of(self.config), combination_of(self.config)
        )
        self.closing.callback(ray.kill, actor, no_restart=True)
        self.buffer = RemoteBuffer(actor)
        try:
            self.news = self.buffer.poll(0.0)
        except RayActorError as error:
            raise UserError(f"the run folder {self.run_dir} cannot be opened: {_last_line(error)}") from error
        # The driver owns the weights, so they outlive every worker.
        self.publisher = Publisher(
            self.config,
            self.run_dir,
            self.buffer,
            lambda weights: [ray.put(weights)],
            self.news.trained,
        )
        self.started, self.epoch = time.time(), self.news.epoch  # the epoch that names this sitting
        self.closing.callback(self.publisher.close)
        self.fleet = Fleet(self.buffer)
        self.closing.callback(self.fleet.end)
        self.gauges = Gauges(self.run_dir.name)
        self.fleet.add(Place("learner-0", self._learner))
        self.scale(self.config)

    def scale(self, config: Config) -> None:
        """Starts or ends samplers and rewards until there are as many as `config` says; the learner stays."""
        self.config = config
        pools = {f"reward-{name}": (self._reward(name), reward.count) for name, reward in config.rewards.items()}
        pools["sampler"] = (self._sampler, config.samplers.count)
        for role, (start, count) in pools.items():
            for place in [place for place in self.fleet.places if place.role == role and place.index >= count]:
                self.fleet.remove(place)
            present = {place.index for place in self.fleet.places if place.role == role}
            for index in sorted(set(range(count)) - present):
                tried = self.rewards.pop(f"{role}-{index}", None)
                self.fleet.add(Place(f"{role}-{index}", start), [tried] if tried else None)

    @_stops_without_a_buffer()
    def step(self) -> News:
        """Hears the news and does what they ask for; while the buffer does not answer, gives the last ones again.

        Raises RunStopped with the reason when the run cannot go on.
        """
        if (news := self._poll()) is None:
            return self.news
        self.seconds |= news.seconds  # a buffer that was restarted has not heard of those who died before
        self.news = news = dataclasses.replace(news, seconds=dict(self.seconds))
        if self.draining and not news.draining:
            self.buffer.drain()
        self.publisher.step(news, lambda trained: self._pace(trained, news))
        if self.publisher.lr_halvings > news.lr_halvings:
            self.buffer.slow(self.publisher.lr_halvings)
        self._scale_as_asked()
        self.fleet.tend(news.overdue, news.seconds)
        self.mirroring.follow(news.trained, len(news.evaluations))
        self.gauges.show(news, self.fleet, self.publisher.log.rows, self.publisher.verdict, self.mirroring.behind)
        if news.stop or time.monotonic() - self.recorded >= RECORD_S:
            self.record(news)
        if news.stop:
            raise RunStopped(news.stop)
        return news

    def _scale_as_asked(self) -> None:
        """`launch.py --scale`: the counts become the run's own, and who asked sees the request go."""
        try:
            if (layer := scale.requested(self.run_dir)) is None:
                return
            fitted = scale.scaled(self.config, layer)
            saved = scale.scaled(RunFolder(self.run_dir).config, layer)  # not what was fitted to this cluster
        except UserError as reason:
            self.fleet.notes.append(scale.set_aside(self.run_dir, reason))
            return
        self.fleet.notes.append(scale.in_words(self.config, layer))
        self.scale(fitted)
        save_config(self.run_dir, saved, list(self.plan.prompts))
        (self.run_dir / scale.REQUEST).unlink(missing_ok=True)

    def _poll(self) -> News | None:
        """The news; None while the buffer does not answer, which is said once."""
        if self.polled is None:
            self.polled, self.asked_at = self.buffer.actor.poll.remote(POLL_S), time.monotonic()
        done, _ = ray.wait([self.polled], timeout=2 * POLL_S)
        silent_s = time.monotonic() - self.asked_at
        if not done:
            if silent_s > PATIENCE_S:
                raise BufferSilent(f"the buffer has not answered for {silent_s:.0f} s")
            if silent_s > SILENT_S:
                self._note(f"the buffer does not answer: does the disk of {self.run_dir} hang? The run waits for it")
            return None
        answer, self.polled = self.polled, None
        try:
            news = ray.get(answer)
        except ActorUnavailableError:  # it restarts, and is asked again
            return self.buffer.poll(POLL_S)
        if silent_s > SILENT_S:
            self._note(f"the buffer answers again, after {silent_s:.0f} s")
        return news

    def _note(self, sentence: str) -> None:
        if sentence not in self.fleet.notes:
            self.fleet.notes.append(sentence)

    def drain(self) -> None:
        """Lets the learner finish the batch it has, and nothing new begin: from the next step on."""
        self.draining = True

    def snapshot(self, news: News) -> Snapshot:
        """What the display shows of `news`."""
        log = self.publisher.log
        return Snapshot(
            trained=news.trained,
            rows=[row for row in log.rows if "batch" in row],
            evaluations={each: means_of(each, row, trained_rewards(self.config)) for each, row in log.evaluations()},
            waiting={place: _waiting_share(spent) for place, spent in by_place(news.seconds).items()},
            orders=news.orders,
            evaluating=news.evaluating,
            set_aside=sum(news.set_aside.values()),
            restarts=sum(self.fleet.restarts.values()),
            notes=[*self.fleet.notes, *news.notes, *self.mirroring.notes, *self.publisher.notes],
            mirror_behind=self.mirroring.behind,
            advice=self.advice,
            earlier=log.earlier_batches if self.epoch > 1 else None,
            earlier_evaluations=log.earlier_evaluations,
        )

    def record(self, news: News) -> None:
        """Writes into run.json where the time of this start went, by place."""
        self.recorded = time.monotonic()
        seconds, restarts = by_place(news.seconds), sum(self.fleet.restarts.values())
        advice = self.advice.sentence if self.advice else ""
        record_sitting(self.run_dir, self.epoch, self.started, seconds, restarts, advice)

    @_stops_without_a_buffer()
    def save_lora(self) -> None:
        self.publisher.save_lora()

    def _pace(self, trained: int, news: News) -> dict[str, float]:
        """Who waits and what to expect, for the row of the last of `trained` batches; nothing while too little is
        known, nor once the samplers run out of orders."""
        config = self.config.buffer
        counts = counts_of((place.name for place in self.fleet.places), self.config)
        self.window.hear(trained, time.monotonic(), news.seconds, counts)
        if trained + config.max_staleness > self.config.run.batches:
            return {}
        sizes = config.batch_size, config.order_size, config.max_staleness
        self.advice = advise(*self.window.read(), counts, *sizes, self._cores())
        return self.advice.numbers() if self.advice else {}

    def _cores(self) -> Cores:
        roles: dict[str, WorkerConfig | LearnerConfig]
        roles = {"samplers": self.config.samplers, "learner": self.config.learner}
        on_cores = {role: needs.threads for role, needs in roles.items() if not needs.num_gpus}
        return Cores(resources().get("CPU", math.inf), on_cores)

    def _sampler(self, worker: str) -> list[ActorHandle[Any]]:
        needs = self.config.samplers
        return [_remote(SamplerActor, worker, needs.num_cpus, needs.num_gpus).remote(worker, as_sent(self.config))]

    def _learner(self, group: str) -> list[ActorHandle[Any]]:
        """An actor for each rank; those after rank 0 are made as soon as it says where it waits for them."""
        needs, config = self.config.learner, as_sent(self.config)

        def start(worker: str) -> Any:
            return _remote(LearnerActor, worker, needs.num_cpus, needs.num_gpus, where=self.learner_options)

        first = start(group).remote(group, group, 0, config)
        if needs.count == 1:
            return [first]
        meeting_point, incarnation = first.meet.remote(), group.rsplit(".", 1)[1]
        names = [f"learner-{rank}.{incarnation}" for rank in range(needs.count)]
        return [first] + [
            start(names[rank]).remote(names[rank], group, rank, config, meeting_point) for rank in range(1, needs.count)
        ]

    def _reward(self, name: str) -> Callable[[str], list[ActorHandle[Any]]]:
        def start(worker: str) -> list[ActorHandle[Any]]:
            needs = as_sent(self.config).rewards[name]
            # By itself Ray sets it from num_cpus, and NumPy reads it as it is imported: bits would depend on that.
            threads: Options = {"runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(needs.threads)}}}
            actor = _remote(RewardActor, worker, needs.num_cpus, needs.num_gpus, where=threads)
            return [actor.remote(worker, name, needs)]

        return start


def _remote(
    kind: type, name: str, num_cpus: float = 0, num_gpus: float = 0, max_restarts: int = 0, where: Options | None = None
) -> Any:
    """`kind` as a class of actors; the dashboard shows `name`, which is the run's own, as its namespace is.

    Ray itself repeats no call: who asked asks again, if that is right."""
    actor: Any = ray.remote(num_cpus=num_cpus, num_gpus=num_gpus, max_restarts=max_restarts, max_task_retries=0)(kind)
    return actor.options(name=name, **(where or {}))


def _waiting_share(seconds: dict[str, float]) -> float:
    waiting = sum(spent for occupation, spent in seconds.items() if occupation.startswith("waiting"))
    return waiting / (sum(seconds.values()) or 1.0)


def _last_line(error: BaseException) -> str:
    """Of an exception in an actor's `__init__`, of which Ray gives only the traceback: its own sentence."""
    return str(error).strip().splitlines()[-1].split("UserError: ")[-1]
