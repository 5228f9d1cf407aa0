"""A real run, watched: its numbers at Ray's metrics endpoint, and in every panel of the Grafana dashboard."""

import json
import os
import re
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from actors.gauges import metric_of, metric_of_evaluation, restarts_by_role
from monitoring.board import BOARD, Query, Series, ask, panels
from tests.pipelines import tiny_pipeline
from tests.running import EXPERIMENT, ROOT, SMALL, TIMEOUT_S, Launched, launched, wait_for

Samples = dict[str, list[tuple[dict[str, str], float]]]  # labels and value by metric

# What DESIGN.md wants to be seen: reward, its parts and spread, age, log-prob gap, clip fraction, KL to the base,
# trajectories a second, set aside, restarts, and for each role the share of its time that it waited and for what.
ALWAYS_SEEN = {
    "ray_ddpo_batch_reward_mean",
    "ray_ddpo_batch_reward",
    "ray_ddpo_batch_reward_std_per_prompt",
    "ray_ddpo_batch_age_max",
    "ray_ddpo_batch_ratio_gap",
    "ray_ddpo_batch_clip_fraction",
    "ray_ddpo_batch_kl_base",
    "ray_ddpo_batch_images_per_s",
    "ray_ddpo_set_aside",
    "ray_ddpo_restarts",
    "ray_ddpo_waiting_share",
}
EMBEDDING = """
import numpy as np
from rewards.base import Scores

class Embedding:
    def __call__(self, images, prompts):
        small = images[:, ::8, ::8].reshape(len(images), -1).astype(np.float32)
        return Scores(small.mean(axis=1), {"embedding": small + 1})
"""
LONG = "run.batches=100000"  # until the test has seen enough


def on_the_board() -> set[str]:
    """The metrics that the dashboard's queries name."""
    queries = [query.expr for row in panels(".*").values() for panel in row for query in panel.queries]
    return set(re.findall(r"\bray_ddpo_\w+", " ".join(queries)))


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Of a run that reports every second, ten times as often as Ray does by default."""
    monkeypatch.setenv("RAY_metrics_report_interval_ms", "1000")
    model = tiny_pipeline(tmp_path / "tiny")
    (tmp_path / "my_rewards.py").write_text(EMBEDDING)
    return [
        EXPERIMENT,
        *SMALL,
        "rewards.beside.path=my_rewards:Embedding",
        "rewards.beside.weight=null",
        "rewards.beside.num_cpus=0.2",
        f"model.path={model}",
        "run.name=watched",
        f"run.mirror=file://{tmp_path}/mirror",
        LONG,
    ]


def port_of(run: Launched) -> int | None:
    """Of the metrics endpoint, which works with and without Ray's dashboard."""
    files = list(run.session.glob("metrics_export_port_*"))
    return int(files[0].read_text()) if files and files[0].read_text() else None


def scrape(port: int) -> Samples:
    """The run's samples at the endpoint now."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            families = text_string_to_metric_families(answer.read().decode())
    except (urllib.error.URLError, TimeoutError):
        return {}
    samples: Samples = {}
    for sample in (sample for family in families for sample in family.samples):
        if sample.name.startswith("ray_ddpo_"):
            samples.setdefault(sample.name, []).append((sample.labels, sample.value))
    return samples


def listening_addresses(port: int) -> set[str]:
    """Local addresses of the sockets that listen at `port`, as the kernel writes them."""
    tables = Path("/proc/net/tcp").read_text() + Path("/proc/net/tcp6").read_text()
    sockets = [line.split() for line in tables.splitlines() if "local_address" not in line]
    return {s[1].split(":")[0] for s in sockets if s[3] == "0A" and int(s[1].split(":")[1], 16) == port}


def rows(tmp_path: Path) -> list[dict[str, float]]:
    lines = (tmp_path / "runs" / "watched" / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "batch" in row]


def test_all_that_the_board_shows_is_at_the_endpoint_on_this_host_only(command: list[str], tmp_path: Path) -> None:
    assert on_the_board() >= ALWAYS_SEEN
    with launched(*command, cwd=tmp_path) as run:
        port = wait_for("a metrics endpoint", lambda: port_of(run))
        wanted = on_the_board()
        samples = wait_for("every metric of the board", lambda: now if wanted <= (now := scrape(port)).keys() else None)
        assert listening_addresses(port) == {"0100007F"}
        written = rows(tmp_path)
    assert {labels["run"] for metric in samples.values() for labels, _ in metric} == {"watched"}
    (labels, value), *others = samples["ray_ddpo_batch_reward"]
    assert labels["reward"] == "compressibility" and not others
    assert value in [row["reward/compressibility"] for row in written]
    exported = {name for name in samples if name.startswith("ray_ddpo_batch_")}
    assert exported >= {f"ray_ddpo_batch_{metric_of(key)[0]}" for key in written[-1]}
    waits = {labels["role"]: (labels["waiting_for"], share) for labels, share in samples["ray_ddpo_waiting_share"]}
    assert waits.keys() == {"samplers", "rewards.compressibility", "rewards.beside", "learner"}
    assert all(cause and 0 <= share <= 1 for cause, share in waits.values())
    working = [count for labels, count in samples["ray_ddpo_workers"] if labels["state"] == "working"]
    assert working == [1, 1, 1, 1]


@contextmanager
def prometheus(discovery: Path, work: Path) -> Iterator[str]:
    """A real Prometheus with the repository's configuration, but for the path of Ray's file and the interval.

    Gives its URL.
    """
    config = yaml.safe_load((ROOT / "monitoring" / "prometheus.yml").read_text())
    config["scrape_configs"][0]["file_sd_configs"][0]["files"] = [str(discovery)]
    config["global"]["scrape_interval"] = "1s"
    work.mkdir()
    (work / "prometheus.yml").write_text(yaml.safe_dump(config))
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    arguments = [f"--config.file={work}/prometheus.yml", f"--storage.tsdb.path={work}/data"]
    arguments += [f"--web.listen-address=127.0.0.1:{port}", "--log.level=error"]
    try:
        process = subprocess.Popen(["prometheus", *arguments])
    except FileNotFoundError:
        pytest.fail("prometheus is missing: apt-get install prometheus")
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(timeout=TIMEOUT_S)


def answered(url: str, expr: str) -> list[Series]:
    """The last five minutes of a query; [] while Prometheus starts."""
    try:
        return ask(url, Query(expr, "{{role}}{{state}}"), time.time() - 300, time.time(), 1.0)
    except urllib.error.URLError as error:
        if isinstance(error, urllib.error.HTTPError) and error.code == 400:
            raise AssertionError(f"{expr}: {error.read().decode()}") from error
        return []


def actor_names(address: str) -> set[str]:
    """What Ray's dashboard calls the actors that live."""
    token = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", Path.home() / ".ray" / "auth_token")).read_text().strip()
    request = urllib.request.Request(f"{address}/api/v0/actors", headers={"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
        actors = json.load(answer)["data"]["result"]["result"]
    return {actor["name"] for actor in actors if actor["state"] == "ALIVE"}


@pytest.mark.watching
def test_every_query_of_the_board_has_data_in_a_real_prometheus(command: list[str], tmp_path: Path) -> None:
    with launched(*command, cwd=tmp_path, dashboard=True) as run:
        discovery = run.session.parent / "prom_metrics_service_discovery.json"
        assert run.process.stdout is not None
        address = re.search(r"http://\S+", run.process.stdout.readline())
        assert address is not None
        with prometheus(discovery, tmp_path / "prometheus") as url:
            for panel in (panel for row in panels("watched").values() for panel in row):
                for query in panel.queries:
                    wait_for(f"data in {panel.title}: {query.expr}", partial(answered, url, query.expr))
            os.kill(run.actor("SamplerActor"), signal.SIGKILL)
            wait_for(
                "a restart of the sampler",
                lambda: answered(url, 'ray_ddpo_restarts{run="watched", role="samplers"} == 1'),
            )
            dead = answered(url, 'ray_ddpo_workers{role="samplers", state="dead"} == 1')
            wait_for("a new sampler", lambda: "sampler-0.1" in actor_names(address[0]))
            names = actor_names(address[0])
            (rewards,) = answered(url, 'ray_ddpo_batch_reward_mean{run="watched"}')
            (trained,) = answered(url, 'ray_ddpo_trained_batches{run="watched"}')
            written = [row["reward/mean"] for row in rows(tmp_path)]
        grafana = run.session / "metrics" / "grafana"
        provisioned = yaml.safe_load((grafana / "provisioning" / "dashboards" / "default.yml").read_text())
        boards = Path(provisioned["providers"][0]["options"]["path"])
        assert (boards / BOARD.name).read_bytes() == BOARD.read_bytes()
    assert dead, "its death was never seen"
    assert names == {"buffer", "reward-compressibility-0.0", "reward-beside-0.0", "learner-0.0", "sampler-0.1"}
    assert len(set(rewards.values)) >= 3 and set(rewards.values) <= set(written)
    assert list(trained.values) == sorted(trained.values) and trained.values[-1] <= len(written)


def test_restarts_of_a_place_that_is_no_more_still_count() -> None:
    by_place = {"sampler-0": 1, "sampler-12": 2, "reward-my-own-0": 0, "learner-0": 3}
    assert restarts_by_role(by_place) == {"samplers": 3, "rewards.my-own": 0, "learner": 3}


def test_keys_become_names_and_tags() -> None:
    assert metric_of("reward/std_per_prompt") == ("reward_std_per_prompt", {})
    assert metric_of("reward/my-own.captions") == ("reward", {"reward": "my-own.captions"})
    assert metric_of("clip_fraction/step_05-09") == ("clip_fraction_by_step", {"step": "05-09"})
    assert metric_of("something/new-1") == ("something_new_1", {})
    assert metric_of_evaluation("my-own.captions/mean") == ("mean", {"measure": "my-own.captions"})
    assert metric_of_evaluation("pictures") == ("pictures", {})
