"""Rollouts: plain diffusers reproduces them, neighbours do not matter, what is stored is what was scored."""

import gc
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from transformers import CLIPTextModel

from common.errors import UserError
from conf.schema import DType, ModelConfig, SamplingConfig
from policy.policy import Policy
from policy.rollout import rollout
from tests.pipelines import tiny_pipeline

PROMPTS = ["a cat on the beach", "two dog riding a bike", "three horse"]
SEEDS = [11, 2**62 + 5, 0]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return ModelConfig(str(tiny_pipeline(tmp_path_factory.mktemp("model") / "pipeline")))


def load(model: ModelConfig, seed: int = 0, **sampling: Any) -> Policy:
    """A policy whose LoRA is not zero."""
    settings = SamplingConfig(**{"steps": 6, "guidance": 3.0, **sampling})
    policy = Policy.load(model, settings, seed, "cpu", trainable=False)
    generator = torch.Generator().manual_seed(4)
    changed = {name: v + 0.2 * torch.randn(v.shape, generator=generator) for name, v in policy.lora_state().items()}
    policy.load_lora_state(changed)
    return policy


def test_shapes_and_types(model: ModelConfig) -> None:
    policy = load(model)
    result = rollout(policy, PROMPTS, SEEDS)
    assert result.latents.shape == (3, 7, 4, 8, 8) and result.latents.dtype == np.float32
    assert result.timesteps.shape == (3, 6) and result.timesteps.dtype == np.int32
    assert result.log_probs.shape == (3, 6) and result.log_probs.dtype == np.float32
    assert result.images.shape == (3, 64, 64, 3) and result.images.dtype == np.uint8
    assert policy.image_size == (64, 64) and policy.latent_shape == (4, 8, 8) and policy.num_steps == 6
    assert result.timesteps[1].tolist() == policy.schedule.timesteps.tolist() == [831, 665, 499, 333, 167, 1]


@pytest.mark.long
@pytest.mark.parametrize(("guidance", "eta"), [(3.0, 1.0), (1.0, 0.5), (3.0, 0.0)])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_plain_diffusers_makes_the_same_pictures(
    tmp_path: Path, prediction_type: str, guidance: float, eta: float
) -> None:
    model = ModelConfig(str(tiny_pipeline(tmp_path / "pipeline", prediction_type=prediction_type)))
    policy = load(model, guidance=guidance, eta=eta)
    policy.save_lora(tmp_path / "lora")
    result = rollout(policy, PROMPTS, SEEDS)

    pipe = StableDiffusionPipeline.from_pretrained(model.path)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)

    def pictures() -> np.ndarray:
        return np.stack(
            [
                np.asarray(
                    pipe(
                        prompt,
                        generator=torch.Generator().manual_seed(seed),
                        num_inference_steps=6,
                        guidance_scale=guidance,
                        eta=eta,
                    ).images[0]
                )
                for prompt, seed in zip(PROMPTS, SEEDS, strict=True)
            ]
        )

    without = pictures()
    pipe.load_lora_weights(tmp_path / "lora")
    difference = np.abs(pictures().astype(float) - result.images).mean(axis=(1, 2, 3))
    assert difference.max() < 0.2  # in units of 1/255; truncating instead of rounding to uint8 would make 0.5
    assert np.abs(without.astype(float) - result.images).mean() > 1  # so the LoRA was loaded, and matters


def test_a_trajectory_does_not_depend_on_its_neighbours(model: ModelConfig) -> None:
    together, policy = rollout(load(model), PROMPTS, SEEDS), load(model)
    for i in reversed(range(3)):
        alone = rollout(policy, PROMPTS[i : i + 1], SEEDS[i : i + 1])
        assert np.array_equal(alone.latents[0, 0], together.latents[i, 0])  # the noise is the same to the bit
        scale = np.abs(together.latents[i]).max()
        np.testing.assert_allclose(alone.latents[0], together.latents[i], rtol=0, atol=2e-5 * scale)
        np.testing.assert_allclose(alone.log_probs[0], together.log_probs[i], rtol=0, atol=1e-4)
        assert np.abs(alone.images[0].astype(int) - together.images[i]).max() <= 1


def test_trajectories_from_one_first_noise_differ_by_the_noise_of_their_steps(model: ModelConfig) -> None:
    own = rollout(load(model), PROMPTS, SEEDS)
    shared = rollout(load(model), PROMPTS, SEEDS, [SEEDS[0], SEEDS[0], SEEDS[2]])
    np.testing.assert_array_equal(shared.latents[[0, 2]], own.latents[[0, 2]])
    np.testing.assert_array_equal(shared.latents[1, 0], own.latents[0, 0])
    policy = load(model)
    for made in (own, shared):  # what the step added to its mean is the trajectory's own
        x, embeds = torch.from_numpy(made.latents[:, 0]), policy.encode(PROMPTS)
        mean, std = policy.gaussian(x, torch.zeros(3, dtype=torch.int64), embeds)
        added = ((torch.from_numpy(made.latents[:, 1]) - mean) / std).detach().numpy()
        generator = torch.Generator().manual_seed(SEEDS[1])
        torch.randn(1, *policy.latent_shape, generator=generator)
        expected = torch.randn(1, *policy.latent_shape, generator=generator).numpy()
        np.testing.assert_allclose(added[1:2], expected, atol=1e-5)


def test_the_same_order_twice_is_the_same_to_the_bit(model: ModelConfig) -> None:
    torch.manual_seed(1)
    first = rollout(load(model), PROMPTS, SEEDS)
    torch.manual_seed(2)
    policy = load(model)
    rollout(policy, PROMPTS[::-1], [7, 8, 9])
    second = rollout(policy, PROMPTS, SEEDS)
    for name in ("latents", "log_probs", "images"):
        assert np.array_equal(getattr(first, name), getattr(second, name)), name
    other = rollout(policy, PROMPTS, [1, 2, 3])
    assert not np.array_equal(first.images, other.images)


@pytest.mark.parametrize("latents_dtype", [DType.float32, DType.float16])
def test_stored_latents_have_exactly_the_stored_log_probs(model: ModelConfig, latents_dtype: DType) -> None:
    """Round first: also in float16 the learner's ratio starts at exactly 1."""
    policy = load(model, latents_dtype=latents_dtype)
    result = rollout(policy, PROMPTS, SEEDS)
    assert result.latents.dtype == latents_dtype
    latents = torch.from_numpy(result.latents)
    for i in range(6):
        scored = policy.log_prob(latents[:, i], latents[:, i + 1], torch.full((3,), i), policy.encode(PROMPTS))
        assert np.array_equal(scored.numpy(), result.log_probs[:, i])
    assert np.array_equal(policy.decode(latents[:, -1]), result.images)


def test_guidance_is_that_of_the_formula_and_one_skips_the_unconditional_pass(model: ModelConfig) -> None:
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    index = torch.tensor([1, 4])
    scales = (1.0, 2.0, 5.0)
    policies = [load(model, guidance=scale) for scale in scales]
    plain, double, strong = (policy.gaussian(x, index, policy.encode(PROMPTS[:2]))[0] for policy in policies)
    torch.testing.assert_close(strong - plain, 4 * (double - plain), rtol=1e-4, atol=1e-4)
    assert (double - plain).abs().max() > 1e-3
    for policy, passes in zip(policies, (1, 2, 2), strict=True):
        calls: list[int] = []
        policy.family.network.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        policy.gaussian(x, index, policy.encode(PROMPTS[:2]))
        assert len(calls) == passes


def test_a_prompt_is_encoded_once_and_the_text_encoder_then_let_go_of(model: ModelConfig, tmp_path: Path) -> None:
    """Without its weights on the disk the text encoder cannot be read again, and need not be for what is known."""

    def encoders() -> set[int]:
        gc.collect()
        return {id(thing) for thing in gc.get_objects() if isinstance(thing, CLIPTextModel)}

    others = encoders()
    folder = shutil.copytree(model.path, tmp_path / "pipeline")
    policy = load(ModelConfig(str(folder)))
    assert encoders() <= others  # not read by loading
    policy.prompts.fill(["a cat", "a dog"])
    assert encoders() <= others
    (folder / "text_encoder" / "model.safetensors").write_bytes(b"")
    (first,) = policy.encode(["a cat", "a dog", "a cat"])
    (second,) = policy.encode(["a dog", "a cat"])
    assert torch.equal(first[0], first[2]) and torch.equal(first[0], second[1]) and torch.equal(first[1], second[0])
    assert not torch.equal(first[0], first[1])
    rollout(policy, ["a dog"], [1])
    with pytest.raises(UserError, match="text_encoder cannot be read"):
        policy.encode(["a dog", "a horse"])
    (fresh,) = load(model).encode(["a dog"])  # encoded alone, in another order: the same bits
    assert torch.equal(fresh[0], first[1])


def test_a_learner_reads_no_vae_and_scores_what_a_sampler_made(model: ModelConfig, tmp_path: Path) -> None:
    folder = shutil.copytree(model.path, tmp_path / "pipeline")
    made = rollout(load(model), PROMPTS, SEEDS)
    (folder / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    spoiled, settings = ModelConfig(str(folder)), SamplingConfig(steps=6, guidance=3.0)
    with pytest.raises(UserError, match="vae cannot be read"):
        Policy.load(spoiled, settings, 0, "cpu", trainable=False)
    learner = Policy.load(spoiled, settings, 0, "cpu", trainable=True)
    learner.load_lora_state(load(model).lora_state())
    latents = torch.from_numpy(made.latents)
    scored = learner.log_prob(latents[:, 2], latents[:, 3], torch.full((3,), 2), learner.encode(PROMPTS))
    assert np.array_equal(scored.detach().numpy(), made.log_probs[:, 2])


@pytest.mark.long
@pytest.mark.parametrize(
    "other",
    [
        {"steps": 4},
        {"guidance": 1.0},
        {"eta": 0.5},
        {"eta": 0.0},
        {"steps": 3, "guidance": 5.0, "latents_dtype": DType.float16},
    ],
)
def test_other_sampling_of_the_same_network_is_that_of_a_fresh_policy(model: ModelConfig, other: dict) -> None:
    policy = load(model)
    before = rollout(policy, PROMPTS, SEEDS)
    settings = SamplingConfig(**{"steps": 6, "guidance": 3.0, **other})
    changed = policy.with_sampling(settings)
    assert changed.family is policy.family and changed.prompts is policy.prompts
    expected, made = rollout(load(model, **other), PROMPTS, SEEDS), rollout(changed, PROMPTS, SEEDS)
    for name in ("latents", "timesteps", "log_probs", "images"):
        assert np.array_equal(getattr(made, name), getattr(expected, name)), name
        assert getattr(made, name).dtype == getattr(expected, name).dtype
    assert not np.array_equal(made.images, before.images)
    changed.load_lora_state({name: 0 * value for name, value in policy.lora_state().items()})
    assert not any(value.any() for value in policy.lora_state().values())  # one LoRA, whoever loads it


def test_other_sampling_leaves_the_policy_as_it_was_and_is_refused_alike(model: ModelConfig) -> None:
    policy = load(model)
    before = rollout(policy, PROMPTS, SEEDS)
    policy.with_sampling(SamplingConfig(steps=3, guidance=5.0))
    impossible: list[dict[str, Any]] = [{"steps": 0}, {"eta": -0.1}, {"guidance": 0.5}]
    for wrong in (*impossible, {"latents_dtype": DType.bfloat16}):
        with pytest.raises(UserError) as fresh:
            load(model, **wrong)
        with pytest.raises(UserError) as refused:
            policy.with_sampling(SamplingConfig(**{"steps": 6, "guidance": 3.0, **wrong}))
        assert str(refused.value) == str(fresh.value)
    after = rollout(policy, PROMPTS, SEEDS)
    assert np.array_equal(after.log_probs, before.log_probs) and np.array_equal(after.images, before.images)


def test_a_prompt_that_is_too_long_is_cut_off_and_says_so(model: ModelConfig, caplog: pytest.LogCaptureFixture) -> None:
    policy = load(model)
    (cut,), (short,) = policy.encode(["a cat " * 100]), policy.encode(["a cat"])
    assert cut.shape == short.shape
    assert "cut off after 77" in caplog.text


def test_a_trajectory_that_is_no_longer_finite_names_its_prompt(model: ModelConfig) -> None:
    policy = load(model)
    policy.load_lora_state({name: value * 1e30 for name, value in policy.lora_state().items()})
    with pytest.raises(ArithmeticError, match=r"'a cat on the beach' and seed 11"):
        rollout(policy, PROMPTS, SEEDS)


@pytest.mark.parametrize("dtype", [DType.float16, DType.bfloat16])
def test_half_precision_makes_nearly_the_same_pictures(model: ModelConfig, dtype: DType) -> None:
    half = rollout(load(ModelConfig(model.path, dtype=dtype)), PROMPTS, SEEDS)
    full = rollout(load(model), PROMPTS, SEEDS)
    assert half.log_probs.dtype == np.float32 and half.latents.dtype == np.float32
    assert 0 < np.abs(half.images.astype(int) - full.images).mean() < 10


def test_a_lora_at_a_scale_is_that_of_diffusers_and_leaves_the_others_alone(model: ModelConfig) -> None:
    policy = load(model)
    own = rollout(policy, PROMPTS, SEEDS)
    half = rollout(policy.with_sampling(SamplingConfig(steps=6, guidance=3.0), 0.5), PROMPTS, SEEDS)
    np.testing.assert_array_equal(rollout(policy, PROMPTS, SEEDS).latents, own.latents)
    state = policy.lora_state()
    policy.load_lora_state({name: 0.5 * value if "lora_B" in name else value for name, value in state.items()})
    np.testing.assert_array_equal(rollout(policy, PROMPTS, SEEDS).latents, half.latents)
    with policy.base():
        base = rollout(policy, PROMPTS, SEEDS)
    none = rollout(policy.with_sampling(SamplingConfig(steps=6, guidance=3.0), 0.0), PROMPTS, SEEDS)
    np.testing.assert_allclose(none.latents, base.latents, atol=1e-5)
    assert np.abs(half.latents - own.latents).max() > 0.1
