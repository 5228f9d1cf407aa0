"""The Ray cluster: a running one, to whose hosts the code travels, or one started here and ended with the run."""

import logging
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray._private import ray_constants
from ray._private.state import state as ray_state

from actors.starting import check_temp_dir, own_python, wait_for_a_worker
from actors.travel import IN_A_JOB, check_places, travelling
from common.errors import UserError
from conf.places import ROOT
from conf.schema import Config, RewardConfig, WorkerConfig

BOARD = ROOT / "monitoring" / "grafana" / "ddpo_dashboard.json"


@contextmanager
def cluster(config: Config) -> Iterator[dict[str, float]]:
    """Connects to `ray.address` or starts Ray on this machine; gives what the cluster has or can grow to
    ({"CPU": 2.0, ...}).

    Raises UserError when there is no cluster at that address, or its hosts could not find what the settings name.
    """
    address = config.ray.address
    if address is None and IN_A_JOB in os.environ:
        raise UserError("this is a job of a Ray cluster, and would start Ray anew on the head: give ray.address=auto")
    if address is None:
        check_temp_dir(config.ray.temp_dir)
        _keep_to_this_host()
        # Not the folder where the user stands: a file types.py in it would keep Python itself from starting.
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        env_vars = {"PYTHONPATH": os.pathsep.join(paths)}
        if _crowds_the_cores(config):
            # By default OpenMP's threads spin while they wait for one another, which is quickest for one process alone
            # and makes two of them many times slower.
            env_vars["OMP_WAIT_POLICY"] = os.environ.get("OMP_WAIT_POLICY", "passive")
        where: dict[str, Any] = {
            "address": "local",
            "include_dashboard": config.ray.dashboard,
            "_temp_dir": config.ray.temp_dir,
            "runtime_env": {"env_vars": env_vars, **own_python()},
            # Ray would not return before a first worker is there, though none may ever be; and that one had other
            # variables than ours, and would do nothing.
            "_system_config": {"prestart_worker_first_driver": False},
        }
    else:
        if address.startswith("ray://"):
            raise UserError(
                f"ray.address={address} is a client's address, and the driver has to run on a host of the cluster: "
                "start it there with ray.address=auto, or submit it as a job (docs/cluster.md)"
            )
        if address != "auto" and not _answers(address):
            raise _nobody_at(address)
        check_places(config)
        os.environ["RAY_OVERRIDE_JOB_RUNTIME_ENV"] = "1"  # where a job has brought code of its own, this comes first
        where = {"address": address, "runtime_env": travelling(config)}
    try:
        context: Any = ray.init(**where, logging_level=logging.ERROR, log_to_driver=False)
    except ConnectionError as error:
        raise _nobody_at(address) from error
    except Exception as error:  # a bare Exception is what Ray raises when its processes do not come up in time
        reason = " ".join(str(error).split())
        if address is None:
            raise UserError(f"Ray could not be started: {reason[:300]} Is a disk full, or the machine busy?") from error
        raise UserError(f"the cluster at ray.address={address} cannot be joined: {reason}") from error
    try:
        wait_for_a_worker(context.address_info["session_dir"])
        if address is None and config.ray.dashboard:
            _offer_board(context.address_info["session_dir"])
            print(f"Ray's dashboard: http://{context.dashboard_url} (it asks for the token in ~/.ray/auth_token)")
        yield resources()
    finally:
        ray.shutdown()


def _keep_to_this_host() -> None:
    """Gives a Ray that is started here the address 127.0.0.1, so that nothing of it listens to other hosts.

    By default Ray does so on macOS and Windows only, and its metrics, which no token guards, would be open to all. It
    reads the switch at import, hence both lines.
    """
    os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"
    ray_constants.ENABLE_RAY_CLUSTER = False


def _offer_board(session_dir: str) -> None:
    """Puts our Grafana dashboard where Ray has put its own: a Grafana that is started with Ray's files shows both."""
    metrics = os.environ.get("RAY_METRICS_OUTPUT_ROOT", f"{session_dir}/metrics")
    boards = os.environ.get("RAY_METRICS_GRAFANA_DASHBOARD_OUTPUT_DIR", f"{metrics}/grafana/dashboards")
    shutil.copy(BOARD, boards)


def _crowds_the_cores(config: Config) -> bool:
    """Whether processes of several threads each may compute at once on the cores of this machine: rewards score while
    samplers roll out, and the learner only where older data are allowed."""
    before_learning: list[WorkerConfig | RewardConfig] = [config.samplers, *config.rewards.values()]
    teams = sum(role.count for role in before_learning if role.threads > 1)
    ranks = config.learner.count if config.learner.threads > 1 else 0
    return max(teams, ranks) > 1 or config.buffer.max_staleness > 0


def resources() -> dict[str, float]:
    """What the cluster has now, or, of what its autoscaler may add, that."""
    has = ray.cluster_resources()
    most = ray_state.get_max_resources_from_cluster_config() or {}  # the autoscaler's own word, None without one
    return {name: max(has.get(name, 0.0), float(most.get(name, 0))) for name in {*has, *most}}


def _answers(address: str) -> bool:
    """Whether somebody listens at host:port. Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, ValueError):
        return False
    return True


def _nobody_at(address: str | None) -> UserError:
    return UserError(
        f"no Ray cluster answers at ray.address={address}: start one (`ray start --head`), "
        "or leave ray.address out to run on this machine"
    )
