"""The Ray cluster: a running one, or one started here and ended with the run."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray

from conf.errors import UserError
from conf.schema import Config

ROOT = Path(__file__).resolve().parent.parent
NOT_SHIPPED = [".git", ".venv", "runs", "data", "docs", "tests", "__pycache__"]


@contextmanager
def cluster(config: Config) -> Iterator[dict[str, float]]:
    """Connects to `ray.address` or starts Ray on this machine; gives the cluster's resources ({"CPU": 2.0, ...}).

    Raises UserError when there is no cluster at that address.
    """
    # Actors on this machine import from the checkout and from where the user stands (their own rewards); to other
    # machines the same code travels as Ray's working directory.
    paths = os.pathsep.join([str(ROOT), str(Path.cwd())])
    local = config.ray.address is None
    runtime_env = {"env_vars": {"PYTHONPATH": paths}} if local else {"working_dir": str(ROOT), "excludes": NOT_SHIPPED}
    try:
        ray.init(
            address="local" if local else config.ray.address,
            include_dashboard=config.ray.dashboard if local else None,
            _temp_dir=config.ray.temp_dir if local else None,
            runtime_env=runtime_env,
            logging_level=logging.ERROR,
            log_to_driver=False,
        )
    except ConnectionError as error:
        raise UserError(
            f"no Ray cluster answers at ray.address={config.ray.address}: start one (`ray up cluster.yaml`), "
            "or leave ray.address out to run on this machine"
        ) from error
    except Exception as error:  # a bare Exception is what Ray raises when its processes do not come up in time
        reason = " ".join(str(error).split())
        raise UserError(f"Ray could not be started: {reason} Is this machine busy, or its disk full?") from error
    try:
        yield ray.cluster_resources()
    finally:
        ray.shutdown()
