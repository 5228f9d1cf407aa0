"""A folder laid out exactly as Stable Diffusion 1.5 is published loads and rolls out: a matter of config alone."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from conf.schema import DType, LoraConfig, ModelConfig, SamplingConfig
from policy.policy import Policy
from policy.rollout import rollout
from tests.pipelines import sd15_layout

pytestmark = pytest.mark.long

PROMPTS, SEEDS = ["a cat on the beach", "two dog playing chess"], [3, 4]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sd15_layout(tmp_path_factory.mktemp("model") / "stable-diffusion-v1-5")


def load(folder: Path, **settings: Any) -> Policy:
    model = ModelConfig(str(folder), **settings)
    return Policy.load(model, SamplingConfig(steps=5, guidance=5.0), 0, "cpu", trainable=False)


def test_its_pndm_config_gives_the_papers_50_steps(folder: Path) -> None:
    policy = Policy.load(ModelConfig(str(folder)), SamplingConfig(), 0, "cpu", trainable=False)
    assert policy.schedule.timesteps.tolist() == list(range(981, 0, -20))
    assert policy.schedule.std[0].item() == pytest.approx(0.454, abs=5e-4)
    assert policy.schedule.std[-1].item() == pytest.approx(0.0206, abs=5e-5)


@pytest.mark.parametrize(
    ("variant", "dtype"),
    [(None, DType.float32), ("fp16", DType.float16), ("fp16", DType.bfloat16), ("fp16", DType.float32)],
)
def test_it_rolls_out_in_every_format(folder: Path, variant: str | None, dtype: DType) -> None:
    policy = load(folder, variant=variant, dtype=dtype)
    own = [parameter for name, parameter in policy.family.network.named_parameters() if "lora" not in name]
    assert all(tensor.dtype == getattr(torch, dtype) for tensor in (*own, *policy.encode(PROMPTS)))
    assert all(value.dtype == torch.float32 for value in policy.lora_state().values())
    result = rollout(policy, PROMPTS, SEEDS)
    assert result.images.shape == (2, 64, 64, 3) and np.isfinite(result.log_probs).all()
    assert result.images.std() > 10  # not blank


def test_the_papers_lora_targets_are_all_attention_projections(folder: Path) -> None:
    names = load(folder).lora_parameters()
    # 16 transformer blocks, self and cross attention, q k v out, A and B
    assert len(names) == 16 * 2 * 4 * 2


def test_plain_diffusers_makes_the_same_picture_from_its_lora(folder: Path, tmp_path: Path) -> None:
    policy = load(folder, lora=LoraConfig(rank=4, alpha=8.0))
    generator = torch.Generator().manual_seed(0)
    policy.load_lora_state(
        {name: v + 0.1 * torch.randn(v.shape, generator=generator) for name, v in policy.lora_state().items()}
    )
    policy.save_lora(tmp_path)
    result = rollout(policy, PROMPTS, SEEDS)

    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, feature_extractor=None)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(tmp_path)
    for prompt, seed, image in zip(PROMPTS, SEEDS, result.images, strict=True):
        made = pipe(
            prompt, num_inference_steps=5, guidance_scale=5.0, eta=1.0, generator=torch.Generator().manual_seed(seed)
        ).images[0]
        assert np.abs(np.asarray(made).astype(float) - image).mean() < 1
