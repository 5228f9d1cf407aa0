"""What a reward finds in its actor, a real one: GPUs that are reserved alone, float32 that is float32, its threads."""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from actors.devices import VISIBLE
from actors.driver import Driver
from buffer.orders import Plan
from buffer.settings import rules_of
from common.errors import UserError
from conf.load import load
from mirror.mirroring import Mirroring
from tests.running import EXPERIMENT, ROOT, SMALL

REWARD = """
import json, os
from pathlib import Path
import numpy as np
import torch

class Looks:
    def __init__(self, file):
        Path(file).write_text(json.dumps({
            "environment": dict(os.environ),
            "gpus": torch.cuda.device_count(),
            "available": torch.cuda.is_available(),
            "threads": torch.get_num_threads(),
            "tf32": torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32,
        }))

    def __call__(self, images, prompts):
        return np.zeros(len(images))

class Interrupts(Looks):
    def __call__(self, images, prompts):
        raise KeyboardInterrupt

class OutOfMemory:
    def __init__(self):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
"""


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with these rewards, and a cluster that believes it has a GPU."""
    folder = tmp_path_factory.mktemp("here")
    (folder / "looking_rewards.py").write_text(REWARD)
    with tempfile.TemporaryDirectory(prefix="ddpo-") as temp:  # short, because Ray's socket paths must be
        ray.init(
            num_cpus=8,
            num_gpus=1,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=100_000_000,
            _temp_dir=temp,
            runtime_env={"env_vars": {"PYTHONPATH": f"{ROOT}:{folder}"}},
        )
        try:
            yield folder
        finally:
            ray.shutdown()


def tried(here: Path, *settings: str) -> None:
    """Starts an actor of each reward and has it tried, as a run does."""
    config = load([EXPERIMENT, *SMALL, "samplers.num_gpus=0", "learner.num_gpus=0", *settings])
    plan = Plan(0, ("a cat", "two dogs"), 8, 2, ())
    with Driver(config, here / "run", plan, Mirroring(None, rules_of(config).served)) as driver:
        driver.try_rewards((16, 16), print)


def test_an_actor_sees_its_reserved_gpus_alone_and_computes_as_its_settings_say(here: Path) -> None:
    def reward(name: str, *more: str) -> list[str]:
        own = ["path=looking_rewards:Looks", f"args.file={here / name}", *more]
        return [f"rewards.{name}.{setting}" for setting in own]

    tried(
        here,
        *reward("small", "num_cpus=0.2"),
        *reward("roomy", "num_cpus=4", "threads=2"),
        *reward("gpu", "num_gpus=1", "num_cpus=1"),
    )
    small, roomy, gpu = (json.loads((here / name).read_text()) for name in ("small", "roomy", "gpu"))
    for found in (small, roomy):
        assert {variable: found["environment"].get(variable) for variable in VISIBLE} == dict.fromkeys(VISIBLE, "")
        assert found["gpus"] == 0 and not found["available"]
    assert gpu["environment"]["CUDA_VISIBLE_DEVICES"] == "0"
    for found, threads in ((small, 1), (roomy, 2), (gpu, 1)):
        assert found["threads"] == threads and found["environment"]["OMP_NUM_THREADS"] == str(threads)
        assert not found["tf32"]


def test_a_reward_that_interrupts_itself_is_one_sentence(here: Path) -> None:
    own = ["rewards.mine.path=looking_rewards:Interrupts", f"rewards.mine.args.file={here / 'interrupts'}"]
    with pytest.raises(UserError, match=r"Reward mine failed on two pictures.*KeyboardInterrupt"):
        tried(here, *own)


def test_memory_that_runs_out_while_a_reward_is_made_is_not_answered_by_mending_it(here: Path) -> None:
    with pytest.raises(UserError, match="Reward mine ran out of memory, or its device failed") as caught:
        tried(here, "rewards.mine.path=looking_rewards:OutOfMemory")
    assert "mend" not in str(caught.value)
