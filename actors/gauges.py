"""A run's numbers at Ray's metrics endpoint, for Prometheus and the Grafana dashboard in `monitoring/grafana`.

    a row of metrics.jsonl    key reward/std    ──►  ray_ddpo_batch_reward_std{run="mine"}
    the state of this moment  orders, workers   ──►  ray_ddpo_orders{run="mine", state="open"}

docs/watching.md has the list. Ray puts `ray_` before the names and labels of its own (session, node) beside the tags.
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence

from ray.util.metrics import Counter, Gauge

from actors.fleet import Fleet
from buffer.protocol import News
from evaluation.guard import Verdict
from monitoring.advice import role_of
from monitoring.metrics import evaluation_of

# Families of keys that are one metric with a tag: prefix of the key, name of the metric, tag.
FAMILIES = (
    ("clip_fraction/step_", "clip_fraction_by_step", "step"),
    ("reward/", "reward", "reward"),
    ("waiting/", "waiting", "role"),
    ("capacity/", "capacity", "role"),
)
OF_ALL_REWARDS = ("reward/mean", "reward/std", "reward/std_per_prompt")
WAITING = "waiting for "  # how a worker's occupations begin while it does nothing


class Gauges:
    """Call `show` at least every ten seconds: Ray forgets a gauge that is not set again within two of its reports.

    Gauges show the run, over all starts of its driver. The restarts and the counter of seconds count from this start,
    and say so; Prometheus' `increase` and `rate` read the counter right across starts.
    """

    def __init__(self, run: str) -> None:
        self.run = run
        self.gauges: dict[str, Gauge] = {}
        self.seconds = Counter(
            "ddpo_worker_seconds", "Seconds that workers of a role spent on this.", ("run", "role", "doing")
        )
        self.counted: dict[tuple[str, str], float] = {}  # seconds of a worker's occupation that the counter has

    def show(
        self,
        news: News,
        fleet: Fleet,
        rows: Sequence[dict[str, float]],
        verdict: Verdict,
        mirror_behind: int | None,
    ) -> None:
        """rows: of metrics.jsonl, oldest first; the last batch and each set's last evaluation are shown.
        mirror_behind: see `Mirroring.behind`."""
        newest = {evaluation.set if evaluation else "": row for row in rows for evaluation in [evaluation_of(row)]}
        for name_of_set, row in newest.items():
            group, of_set = ("evaluation", {"set": name_of_set}) if name_of_set else ("batch", {})
            for key, value in row.items():
                key = key.removeprefix(f"evaluation/{name_of_set}/")
                name, tags = metric_of_evaluation(key) if name_of_set else metric_of(key)
                self._set(f"{group}_{name}", f"{key} of the newest {group}.", value, **of_set, **tags)
        self._set("guard_best", "The version whose LoRA is in lora_best/.", verdict.best)
        self._set("guard_wrong", "Evaluated versions at which what the guard watches went wrong.", len(verdict.wrong))
        self._show_progress(news)
        self._show_workers(news, fleet)
        self._show_time(news)
        if mirror_behind is not None:
            self._set("mirror_behind", "Trained batches that the mirror does not have yet.", mirror_behind)

    def _show_progress(self, news: News) -> None:
        self._set("trained_batches", "Batches trained, which is also the newest version.", news.trained)
        self._set("batches", "Batches that the run is to train.", news.batches)
        self._set("epoch", "Starts of the buffer since the run began.", news.epoch)
        self._set("set_aside", "Pictures set aside since the run began.", sum(news.set_aside.values()))
        for state, count in news.orders.items():
            self._set("orders", "Orders of admitted batches by state.", count, state=state)

    def _show_workers(self, news: News, fleet: Fleet) -> None:
        workers: dict[tuple[str, str], int] = defaultdict(int)
        for place in fleet.places:
            role = role_of(place.name)
            for state in ("working", "starting", "dead"):
                workers[role, state] += 0
            state = "dead" if not place.actors else "working" if place.worker in news.seconds else "starting"
            workers[role, state] += 1
        for (role, state), count in workers.items():
            self._set("workers", "Workers by role and state.", count, role=role, state=state)
        for role, count in restarts_by_role(fleet.restarts).items():
            self._set("restarts", "Workers started in the place of dead ones, since this start.", count, role=role)

    def _show_time(self, news: News) -> None:
        spent: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        for worker, occupations in news.seconds.items():
            role = role_of(worker)
            for doing, seconds in occupations.items():
                spent[role][doing] += seconds
                if (more := seconds - self.counted.get((worker, doing), 0.0)) > 0:
                    self.counted[worker, doing] = seconds
                    self.seconds.inc(more, {"run": self.run, "role": role, "doing": doing})
        for role, occupations in spent.items():
            total = sum(occupations.values()) or 1.0
            for doing, seconds in occupations.items():
                if doing.startswith(WAITING):
                    cause = doing.removeprefix(WAITING)
                    what = "Share of its time that a role waited, and for what, since this start."
                    self._set("waiting_share", what, seconds / total, role=role, waiting_for=cause)

    def _set(self, name: str, description: str, value: float, **tags: str) -> None:
        if name not in self.gauges:
            self.gauges[name] = Gauge(f"ddpo_{name}", description, ("run", *tags))
        self.gauges[name].set(value, {"run": self.run, **tags})


def restarts_by_role(restarts: Mapping[str, int]) -> dict[str, int]:
    """From those by place ("sampler-0"), of places that are no more as well: a count does not fall."""
    roles: dict[str, int] = defaultdict(int)
    for place, count in restarts.items():
        roles[role_of(place)] += count
    return dict(roles)


def metric_of(key: str) -> tuple[str, dict[str, str]]:
    """The metric's name and tags for a key of metrics.jsonl.

    Example: "kl/base" -> ("kl_base", {}), "reward/aesthetic" -> ("reward", {"reward": "aesthetic"})
    """
    for prefix, name, tag in FAMILIES:
        if key.startswith(prefix) and key not in OF_ALL_REWARDS:
            return name, {tag: key.removeprefix(prefix)}
    return re.sub(r"\W", "_", key, flags=re.ASCII), {}


def metric_of_evaluation(key: str) -> tuple[str, dict[str, str]]:
    """As `metric_of`, of an evaluation's key without its set.

    Example: "clip/mean" -> ("mean", {"measure": "clip"}), "pictures" -> ("pictures", {})
    """
    measure, _, statistic = key.rpartition("/")
    return (statistic, {"measure": measure}) if measure else (key, {})
