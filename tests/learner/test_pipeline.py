"""The update on a real, small StableDiffusionPipeline: gradient, checkpointing, and resuming bit for bit."""

import dataclasses
import json
import resource
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from buffer.orders import Version
from common.errors import RunStopped, UserError
from conf.schema import Config, DType, GuidanceGradient
from learner import recovery
from learner.batch import Batch
from learner.learner import Learner
from learner.objectives.ddpo import ImportanceSampling
from learner.objectives.objective import StepResult
from learner.optimizer_state import optimizer_state
from learner.ranks import Ranks
from learner.registry import make_objective
from learner.update import BaseKL, Updater
from policy import lora
from policy.families.stable_diffusion import StableDiffusion
from policy.policy import Policy
from policy.rollout import rollout
from tests.pipelines import tiny_pipeline

pytestmark = pytest.mark.long

STEPS = 8
PROMPTS = ("a cat", "a dog", "two cat on the beach", "a horse")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def config(folder: Path) -> Config:
    return small(folder)


def small(folder: Path) -> Config:
    config = Config()
    config.model.path = str(folder)
    config.model.lora.rank = 2
    config.sampling.steps = STEPS
    config.sampling.guidance = 3.0  # at 5, float32's noise in this random network's output reaches 1e-5 by itself
    config.buffer.batch_size = 8
    config.learner.lr = 1e-2
    config.learner.clip_range = 1e-3
    config.learner.microbatch = 24
    config.learner.tracker_size = 4  # so that rewards are forgotten within six batches
    config.learner.tracker_min_count = 3
    return config


def load(config: Config, **options: bool) -> Policy:
    """A learner's policy, with the VAE that it leaves out: here it rolls out, too."""
    policy = Policy.load(config.model, config.sampling, config.run.seed, "cpu", trainable=True, **options)
    assert isinstance(policy.family, StableDiffusion)
    policy.family.vae = AutoencoderKL.from_pretrained(
        config.model.path, subfolder="vae", torch_dtype=policy.arithmetic, low_cpu_mem_usage=False
    )
    return policy


def away_from_zero(policy: Policy) -> None:
    """B is zero at the start, and then A has no gradient."""
    state, generator = policy.lora_state(), torch.Generator().manual_seed(7)
    policy.load_lora_state({k: v + 0.1 * torch.randn(v.shape, generator=generator) for k, v in state.items()})


def make_batch(policy: Policy, number: int, count: int = 8) -> Batch:
    """What samplers at the policy's version would give, with a reward that any picture has."""
    prompts = [PROMPTS[(number + row) % len(PROMPTS)] for row in range(count)]
    made = rollout(policy, prompts, [1000 * number + row for row in range(count)])
    return Batch(
        number=number,
        prompts=tuple(prompts),
        rewards=made.images.mean(axis=(1, 2, 3)).astype(np.float32),
        parts={},
        groups=np.zeros(count, np.int64),
        ages=np.zeros(count, np.int32),
        ages_in_flight=np.zeros(count, np.int32),
        latents=made.latents,
        log_probs=made.log_probs,
    )


def one_step(policy: Policy, config: Config, ranks: Ranks | None = None) -> Updater:
    """With all pairs of a batch in one optimizer step."""
    whole = dataclasses.replace(config, learner=dataclasses.replace(config.learner, optimizer_steps=1))
    return Updater(policy, make_objective(whole), whole.learner, ranks)


def gradient(policy: Policy, config: Config, batch: Batch, microbatch: int) -> torch.Tensor:
    updater = one_step(policy, config)
    advantages = np.random.default_rng(2).normal(size=len(batch)).astype(np.float32)
    updater.gradient(batch, advantages, updater.objective.draw(batch)[0], microbatch)
    return torch.cat([p.grad.flatten() for p in updater.parameters.values() if p.grad is not None])


def error(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one - other).norm() / other.norm()).item()


@pytest.fixture
def policy(config: Config) -> Policy:
    policy = load(config)
    away_from_zero(policy)
    return policy


@pytest.mark.parametrize("microbatch", [1, 7])
def test_the_gradient_is_the_same_for_every_microbatch(policy: Policy, config: Config, microbatch: int) -> None:
    config.learner.clip_range = 1.0  # the last bits must not decide what is clipped
    batch = make_batch(policy, 0)
    whole = gradient(policy, config, batch, len(batch) * STEPS)
    assert whole.norm() > 0
    assert error(gradient(policy, config, batch, microbatch), whole) < 1e-5


def test_the_gradient_is_exact_in_float64(config: Config) -> None:
    """So what is left in float32 is the network's rounding, and not the accumulation's doing."""
    config.learner.clip_range = 1.0
    config.model.dtype = DType.float64
    policy = load(config)
    away_from_zero(policy)
    batch = make_batch(policy, 0, count=4)
    assert error(gradient(policy, config, batch, 7), gradient(policy, config, batch, 4 * STEPS)) < 1e-12


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_gradient_of_the_kl_penalty_is_a_finite_difference(config: Config, guidance: float) -> None:
    config.model.dtype, config.sampling.guidance, config.learner.kl_weight = DType.float64, guidance, 0.7
    policy = load(config)
    away_from_zero(policy)
    batch, none = make_batch(policy, 0, count=2), np.zeros(2, np.float32)
    updater = one_step(policy, config)
    (pairs,) = updater.objective.draw(batch)
    updater.gradient(batch, none, pairs, 8)
    generator, state = torch.Generator().manual_seed(3), policy.lora_state()
    way = {name: torch.randn(value.shape, generator=generator, dtype=value.dtype) for name, value in state.items()}
    slope = sum((p.grad * way[name]).sum().item() for name, p in updater.parameters.items() if p.grad is not None)

    def loss(along: float) -> float:
        policy.load_lora_state({name: value + along * way[name] for name, value in state.items()})
        return updater.gradient(batch, none, pairs, 8)["loss"].mean().item()

    assert slope == pytest.approx((loss(1e-5) - loss(-1e-5)) / 2e-5, rel=1e-6)


def test_score_function_and_importance_sampling_have_one_gradient_at_ratio_one(policy: Policy, config: Config) -> None:
    config.learner.clip_range = 1.0
    batch = make_batch(policy, 0)
    sampled = gradient(policy, config, batch, 8)
    config.learner.objective = "ddpo_sf"
    assert error(gradient(policy, config, batch, 8), sampled) < 1e-5


def test_gradient_checkpointing_has_the_same_gradient(policy: Policy, config: Config) -> None:
    config.learner.clip_range = 1.0
    batch = make_batch(policy, 0)
    checkpointed = load(config, gradient_checkpointing=True)
    away_from_zero(checkpointed)
    assert error(gradient(checkpointed, config, batch, 8), gradient(policy, config, batch, 8)) < 1e-5


def test_guidance_gradient_reaches_the_policy(policy: Policy, config: Config) -> None:
    batch = make_batch(policy, 0)
    full = gradient(policy, config, batch, 8)
    config.learner.guidance_gradient = GuidanceGradient.conditional
    assert error(gradient(policy, config, batch, 8), full) > 1e-2


def test_log_prob_gap_is_zero_in_equal_shapes_and_small_in_others(config: Config) -> None:
    config.learner.optimizer_steps = 1
    gaps = []
    for microbatch in (8, 3):  # the rollout was of 8
        config.learner.microbatch = microbatch
        learner = Learner(load(config), config)
        away_from_zero(learner.policy)
        gaps.append(learner.train(make_batch(learner.policy, 0)).metrics["ratio/gap"])
    assert gaps[0] == 0
    assert gaps[1] <= 5e-6


def state_of(learner: Learner) -> dict[str, Any]:
    return {
        "version": learner.version,
        "lora": learner.policy.lora_state(),
        "published": learner.published,
        "optimizer": optimizer_state(learner.updater.optimizer, learner.updater.parameters),
        "advantage": learner.advantage.state_dict(),
        "kl_weight": learner.objective.kl_weight,
        "optimizer_steps": learner.optimizer_steps,
        "lr_halvings": learner.lr_halvings,
    }


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        if isinstance(value, dict) and value and isinstance(next(iter(value.values())), torch.Tensor):
            assert value.keys() == other[key].keys()
            assert all(torch.equal(tensor, other[key][name]) for name, tensor in value.items()), key
        else:
            assert value == other[key], key


@pytest.mark.parametrize("objective", ["ddpo_is", "nft"])
def test_six_batches_equal_three_a_restart_and_three(config: Config, tmp_path: Path, objective: str) -> None:
    config.sampling.steps = 4
    config.learner.objective, config.learner.kl_weight = objective, 0.5
    config.learner.kl_target = 1e-3  # so that the weight is another in every batch
    if objective == "nft":
        config.learner.objective_args = {"follow_rise": 0.1}  # so that samplers never have what is trained
    whole = Learner(load(config), config)
    metrics = [whole.train(make_batch(whole.policy, number), number > 3).metrics for number in range(6)]
    assert (whole.sampling is not None) == (objective == "nft") and whole.lr_halvings == 1

    first = Learner(load(config), config)
    for number in range(3):
        first.train(make_batch(first.policy, number))
    first.save(tmp_path / "v3")
    torch.manual_seed(99)  # the global state is no part of a run
    second = Learner(load(config), config)
    second.restore(tmp_path / "v3", first.version)
    assert_same(state_of(first), state_of(second))
    resumed = [second.train(make_batch(second.policy, number), number > 3).metrics for number in range(3, 6)]
    assert_same(state_of(whole), state_of(second))
    assert metrics[3:] == resumed
    assert whole.version.number == 6 and whole.optimizer_steps == 12
    assert len({row["kl/weight"] for row in metrics}) == 6


def test_samplers_follow_the_trained_policy_as_slowly_as_the_objective_says(config: Config, tmp_path: Path) -> None:
    config.learner.objective, config.learner.objective_args = "nft", {"follow": 0.5, "follow_rise": 0.3}
    learner = Learner(load(config), config)
    for number, stays in enumerate((0.0, 0.3, 0.5)):
        old, batch = learner.published, make_batch(learner.policy, number)
        with learner.updater._as(old):
            base = learner.updater.kl_to_base(batch)
        row = learner.train(batch).metrics
        assert base and row["kl/base"] == base.trajectory  # of what is evaluated, guarded and handed out
        for name, trained in learner.policy.lora_state().items():
            torch.testing.assert_close(learner.published[name], stays * old[name] + (1 - stays) * trained)
        assert learner.version.digest == lora.digest(learner.published)
    learner.save(tmp_path / "v3")
    assert lora.digest(lora.read_own(tmp_path / "v3")) == learner.version.digest  # what samplers are given
    assert lora.digest(learner.policy.lora_state()) != learner.version.digest


def test_version_0_is_saved_and_restored(config: Config, tmp_path: Path) -> None:
    learner = Learner(load(config), config)
    learner.save(tmp_path / "v0")
    version, before = learner.version, state_of(learner)
    learner.train(make_batch(learner.policy, 0))
    assert state_of(learner)["version"] != before["version"]
    learner.restore(tmp_path / "v0", version)  # as a learner does that hears of another recovery point than its own
    assert_same(state_of(learner), before)


def test_the_recovery_point_is_a_lora_that_diffusers_loads(config: Config, tmp_path: Path) -> None:
    learner = Learner(load(config), config)
    learner.train(make_batch(learner.policy, 0))
    learner.save(tmp_path / "v1")
    state = lora.read_own(tmp_path / "v1")
    assert lora.digest(state) == learner.version.digest
    assert all(torch.equal(state[name], tensor) for name, tensor in learner.policy.lora_state().items())


def test_a_recovery_point_is_never_overwritten_and_leaves_no_temporary_files(config: Config, tmp_path: Path) -> None:
    learner = Learner(load(config), config)
    learner.save(tmp_path / "v0")
    before = {file.name: file.read_bytes() for file in (tmp_path / "v0").iterdir()}
    with pytest.raises(FileExistsError):
        learner.save(tmp_path / "v0")
    assert before == {file.name: file.read_bytes() for file in (tmp_path / "v0").iterdir()}
    assert [path.name for path in tmp_path.iterdir()] == ["v0"]


@pytest.mark.parametrize("limit", [2048, 40_000])
def test_a_full_disk_stops_the_run_and_leaves_nothing(
    saved: tuple[Learner, Path, Version], config: Config, tmp_path: Path, limit: int
) -> None:
    """A limit on the size of files stands for the disk; it strikes in the LoRA's file, or in the optimizer's."""
    _, good, version = saved
    learner = Learner(load(config), config)
    learner.restore(good, version)
    assert (good / FILES[2]).stat().st_size < 40_000 < (good / FILES[1]).stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(RunStopped, match="full"):
            learner.save(tmp_path / "v1")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []
    learner.save(tmp_path / "v1")  # with space again


FILES = ("state.json", "optimizer.safetensors", "pytorch_lora_weights.safetensors")


@pytest.fixture(scope="module")
def saved(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Learner, Path, Version]:
    """A learner at version 0, and the recovery point of a version 1."""
    config = small(folder)
    path = tmp_path_factory.mktemp("saved") / "v1"
    learner = Learner(load(config), config)
    learner.train(make_batch(learner.policy, 0))
    learner.save(path)
    return Learner(load(config), config), path, learner.version


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", ["missing", "truncated", "empty", "changed"])
def test_a_damaged_recovery_point_is_refused_in_one_sentence(
    saved: tuple[Learner, Path, Version], tmp_path: Path, file: str, damage: str
) -> None:
    fresh, good, version = saved
    shutil.copytree(good, tmp_path / "v1")
    path = tmp_path / "v1" / file
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "changed":  # one digit of a number, one bit of a weight
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    else:
        path.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"")
    before = state_of(fresh)
    with pytest.raises(UserError) as caught:
        fresh.restore(tmp_path / "v1", version)
    assert file in str(caught.value) and "new run" in str(caught.value) and "\n" not in str(caught.value)
    assert_same(state_of(fresh), before)


def test_a_recovery_point_of_other_settings_is_refused(config: Config, tmp_path: Path) -> None:
    learner = Learner(load(config), config)
    learner.save(tmp_path / "v0")
    config.run.seed = 5
    with pytest.raises(UserError, match=r"run\.seed=0.*has 5"):
        Learner(load(config), config).restore(tmp_path / "v0", learner.version)


def test_a_readable_recovery_point_of_other_weights_is_refused(
    saved: tuple[Learner, Path, Version], config: Config, tmp_path: Path
) -> None:
    """A whole folder of another version in its place, and a LoRA of another version with a state that says it fits."""
    fresh, good, version = saved
    fresh.save(tmp_path / "v0")
    before = state_of(fresh)
    with pytest.raises(UserError, match=r"is of version 0 .*, not of version 1 "):
        fresh.restore(tmp_path / "v0", version)
    with pytest.raises(UserError, match=r"holds other weights \(.*\) than those of version 1 "):
        recovery.read_lora(tmp_path / "v0", version)
    assert_same(state_of(fresh), before)
    assert lora.digest(recovery.read_lora(good, version)) == version.digest


def test_the_state_file_is_plain_json_with_a_seal(config: Config, tmp_path: Path) -> None:
    learner = Learner(load(config), config)
    learner.train(make_batch(learner.policy, 0))
    learner.save(tmp_path / "v1")
    body = json.loads((tmp_path / "v1" / "state.json").read_text().splitlines()[0])
    assert body["version"] == list(learner.version)
    assert body["advantage"] == learner.advantage.state_dict()


def test_a_batch_out_of_order_is_refused(config: Config) -> None:
    learner = Learner(load(config), config)
    batch = make_batch(learner.policy, 1)
    with pytest.raises(ValueError, match="cannot train batch 1"):
        learner.train(batch)


def test_advantages_are_clipped_and_given_by_row(config: Config) -> None:
    config.learner.advantage_clip = 0.5
    learner = Learner(load(config), config)
    batch = dataclasses.replace(make_batch(learner.policy, 0), rewards=np.arange(8, dtype=np.float32))
    advantages = learner.train(batch).advantages
    values = (np.arange(8) - 3.5) / np.std(np.arange(8))
    np.testing.assert_allclose(advantages, np.clip(values, -0.5, 0.5), rtol=1e-5)


def test_steps_after_the_first_few_are_not_trained_on(config: Config) -> None:
    """Whatever the last steps hold, the weights after the update are the same; not so when all steps count."""
    config.sampling.steps = 4
    for count, same in ((2, True), (None, False)):
        config.learner.train_steps = count
        digests = []
        for noise in (0.0, 0.3):
            learner = Learner(load(config), config)
            batch = make_batch(learner.policy, 0)
            latents = batch.latents.copy()
            latents[:, 3:] += noise  # of step 2 and later; step 1 ends at latents 2
            learner.train(dataclasses.replace(batch, latents=latents))
            digests.append(learner.version.digest)
        assert (digests[0] == digests[1]) is same


def test_only_the_share_furthest_from_0_is_trained_on(config: Config) -> None:
    """Whatever the path of a picture near 0 holds, the weights after the update are the same; of one further not."""
    config.learner.train_share = 0.5
    rewards = np.array([0, 3, 3.5, 4, 4.5, 5, 8, 9], np.float32)  # rows 0, 1, 6 and 7 of a mean of 4.6
    digests = []
    for row in (None, 4, 1):
        learner = Learner(load(config), config)
        batch = dataclasses.replace(make_batch(learner.policy, 0), rewards=rewards)
        if row is not None:
            batch.latents[row, 1:] += 0.3
        trained = learner.train(batch)
        assert len(trained.advantages) == 8 and trained.metrics["trajectories"] == 8
        digests.append(learner.version.digest)
    assert digests[0] == digests[1] != digests[2]


def test_a_kl_that_is_no_number_steers_nothing(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half precision overflows in one batch, and the next goes on from the weight before it."""
    config.learner.kl_weight, config.learner.kl_target = 0.5, 1e-3
    learner = Learner(load(config), config)
    with monkeypatch.context() as overflowing:
        overflowing.setattr(learner.updater, "kl_to_base", lambda *_: BaseKL(float("nan"), float("nan")))
        learner.train(make_batch(learner.policy, 0))
    learner.save(tmp_path / "point")
    assert learner.objective.kl_weight == 0.5
    learner.train(make_batch(learner.policy, 1))
    assert 0 < learner.objective.kl_weight != 0.5


class Curves(ImportanceSampling):
    """An objective of a user's own, whose numbers are numpy's, and not all finite."""

    def metrics(self, batch: Batch, steps: Sequence[StepResult]) -> dict[str, Any]:
        return {"own/half": np.float32(0.5), "own/none": np.float64("nan"), "own/infinite": np.float32("inf")}


def test_an_objectives_own_curves_are_kept_as_plain_finite_numbers(config: Config, tmp_path: Path) -> None:
    config.learner.objective = f"{Curves.__module__}:Curves"
    learner = Learner(load(config), config)
    metrics = learner.train(make_batch(learner.policy, 0)).metrics
    assert {name: value for name, value in metrics.items() if name.startswith("own/")} == {"own/half": 0.5}
    learner.save(tmp_path / "point")
    assert recovery.read_metrics(tmp_path / "point", learner.version) == metrics


@pytest.mark.parametrize("state", [{"mean": np.float32(1)}, {7: 1.0}, {"last": (1.0, 2.0)}, {"mean": float("nan")}])
def test_a_state_that_would_come_back_as_another_is_refused(
    config: Config, tmp_path: Path, state: dict[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = Learner(load(config), config)
    monkeypatch.setattr(learner.advantage, "state_dict", lambda: state)
    with pytest.raises(UserError, match="=per_prompt has a state_dict that JSON does not give back"):
        learner.save(tmp_path / "point")
