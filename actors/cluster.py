"""The Ray cluster: a running one, or one started here and ended with the run."""

import logging
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray._private import ray_constants

from conf.errors import UserError
from conf.schema import Config

ROOT = Path(__file__).resolve().parent.parent
BOARD = ROOT / "monitoring" / "grafana" / "ddpo_dashboard.json"
NOT_SHIPPED = [".git", ".venv", "runs", "data", "docs", "tests", "__pycache__"]


@contextmanager
def cluster(config: Config) -> Iterator[dict[str, float]]:
    """Connects to `ray.address` or starts Ray on this machine; gives the cluster's resources ({"CPU": 2.0, ...}).

    Raises UserError when there is no cluster at that address.
    """
    address = config.ray.address
    if address is None:
        _keep_to_this_host()
        # Actors import from the checkout and from where the user stands (their own rewards).
        paths = [str(ROOT), str(Path.cwd()), *filter(None, [os.environ.get("PYTHONPATH")])]
        where: dict[str, Any] = {
            "address": "local",
            "include_dashboard": config.ray.dashboard,
            "_temp_dir": config.ray.temp_dir,
            "runtime_env": {"env_vars": {"PYTHONPATH": os.pathsep.join(paths)}},
        }
    else:
        where = {"address": address, "runtime_env": {"working_dir": str(ROOT), "excludes": NOT_SHIPPED}}
    try:
        if address is not None and address != "auto":
            _knock(address)
        context: Any = ray.init(**where, logging_level=logging.ERROR, log_to_driver=False)
    except ConnectionError as error:
        raise UserError(
            f"no Ray cluster answers at ray.address={address}: start one (`ray start --head`), "
            "or leave ray.address out to run on this machine"
        ) from error
    except Exception as error:  # a bare Exception is what Ray raises when its processes do not come up in time
        reason = " ".join(str(error).split())
        raise UserError(f"Ray could not be started: {reason} Is this machine busy, or its disk full?") from error
    try:
        if address is None and config.ray.dashboard:
            _offer_board(context.address_info["session_dir"])
            print(f"Ray's dashboard: http://{context.dashboard_url} (it asks for the token in ~/.ray/auth_token)")
        yield ray.cluster_resources()
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


def _knock(address: str) -> None:
    """Raises ConnectionError unless somebody listens at host:port. Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, ValueError) as error:
        raise ConnectionError(address) from error
