"""What the checks accept can be rolled out, stored and trained on: every choice among words, on the tiny pipeline."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from buffer.orders import Order
from buffer.schema import rollout_table
from common.errors import UserError
from conf.load import load
from conf.schema import DType, GuidanceGradient
from conf.validate import validate
from learner.batch import Batch
from learner.learner import Learner
from learner.paths import ADVANTAGES, OBJECTIVES
from policy.policy import Policy
from policy.rollout import rollout
from tests.pipelines import tiny_pipeline
from tests.running import SMALL

pytestmark = pytest.mark.long

WORDS = ("model.dtype", "sampling.latents_dtype", "learner.objective", "learner.advantage", "learner.guidance_gradient")
CHOICES = [
    *itertools.product(DType, DType, ["ddpo_is"], ["per_prompt"], ["full"]),
    *itertools.product(["float32"], ["float32"], OBJECTIVES.built_in, ["per_prompt"], GuidanceGradient),
    *itertools.product(["float32"], ["float32"], ["ddpo_is"], ADVANTAGES.built_in, ["full"]),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline(tmp_path_factory.mktemp("models") / "tiny")


@pytest.mark.parametrize("choice", CHOICES, ids=" ".join)
def test_what_is_accepted_makes_a_table_and_an_update(choice: tuple[str, ...], model: Path, tmp_path: Path) -> None:
    words = [f"{key}={word}" for key, word in zip(WORDS, choice, strict=True)]
    config = load(["compressibility", *SMALL, *words, "learner.optimizer_steps=1", f"model.path={model}"])
    try:
        validate(config)
    except UserError as refused:
        assert choice[0] == "float64" or choice[1] in ("float64", "bfloat16"), refused
        return
    policy = Policy.load(config.model, config.sampling, config.run.seed, "cpu", trainable=False)
    order = Order("o", 0, None, (0, 1), ("a cat", "two dogs"), (0, 1), (3, 4), (3, 4))
    made = rollout(policy, order.prompts, order.seeds)
    rollout_table(order, made.images, {"latents": made.latents, "log_probs": made.log_probs})
    ages = np.zeros(2, np.int32)
    rewards = np.array([0, 1], np.float32)
    batch = Batch(0, order.prompts, rewards, {}, ages, ages, ages, made.latents, made.log_probs)
    learner = Learner.load(config, "cpu")
    trained = learner.train(batch)
    assert trained.metrics["non_finite_steps"] == 0 and learner.version.number == 1
    learner.save(tmp_path / "point")
    learner.restore(tmp_path / "point", learner.version)
