"""LoRA: where it starts, that it comes back exactly, what diffusers reads, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from common.errors import UserError
from conf.schema import DType, GuidanceGradient, LoraConfig, ModelConfig, SamplingConfig
from policy import lora
from policy.check import check_lora
from policy.family import Conditioning
from policy.policy import Policy
from policy.prompt_cache import PromptCache
from policy.source import WEIGHT_NAME
from tests.pipelines import tiny_pipeline

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline(tmp_path_factory.mktemp("model") / "pipeline")


def load(
    folder: Path,
    seed: int = 0,
    trainable: bool = False,
    dtype: DType = DType.float32,
    gradient_checkpointing: bool = False,
    **lora_settings: Any,
) -> Policy:
    model = ModelConfig(str(folder), dtype=dtype, lora=LoraConfig(**lora_settings))
    sampling = SamplingConfig(steps=6, guidance=3.0)
    return Policy.load(model, sampling, seed, "cpu", trainable, gradient_checkpointing)


def noisy(state: dict[str, torch.Tensor], scale: float = 0.2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(9)
    return {name: value + scale * torch.randn(value.shape, generator=generator) for name, value in state.items()}


def inputs(policy: Policy, n: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Conditioning]:
    """(latents, next latents, steps, conditioning) of n pairs; the next latents lie where the policy might put them."""
    generator = torch.Generator().manual_seed(3)
    x, noise = torch.randn(2, n, 4, 8, 8, generator=generator)
    index, embeds = torch.arange(n) % 6, policy.encode(["a cat", "two dog"] * (n // 2))
    with torch.no_grad():
        mean, std = policy.gaussian(x, index, embeds)
    return x, (mean + std * noise).to(policy.arithmetic), index, embeds


def gradient(policy: Policy, guidance_gradient: str = "full", weight: float = 1.0) -> torch.Tensor:
    """The gradient of a weighted mean of log-probs, all parameters in one vector."""
    x, x_next, index, embeds = inputs(policy)
    parameters = list(policy.lora_parameters().values())
    weights = torch.tensor([1.0, -2.0, 0.5, 1.5]) * weight
    loss = (weights * policy.log_prob(x, x_next, index, embeds, guidance_gradient)).sum()
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])


def test_it_starts_as_the_base_model(folder: Path) -> None:
    policy = load(folder)
    arguments = inputs(policy)
    with policy.base():
        base = policy.log_prob(*arguments)
    assert torch.equal(policy.log_prob(*arguments), base)
    policy.load_lora_state(noisy(policy.lora_state()))
    assert not torch.allclose(policy.log_prob(*arguments), base)
    with policy.base():
        assert torch.equal(policy.log_prob(*arguments), base)


def test_the_start_follows_from_the_seed_alone(folder: Path) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = load(folder, seed=5).lora_state()
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    second, other = load(folder, seed=5).lora_state(), load(folder, seed=6).lora_state()
    fewer = load(folder, seed=5, targets=["to_k"]).lora_state()
    assert lora.digest(first) == lora.digest(second) != lora.digest(other)
    assert all(torch.equal(first[name], value) for name, value in fewer.items())
    for name, value in first.items():
        if "lora_B" in name:
            assert not value.any()
        else:
            bound = value.shape[1] ** -0.5
            assert 0.8 * bound < value.abs().max() <= bound and abs(value.mean()) < 0.3 * bound
    a = [value for name, value in first.items() if name.endswith("to_q.lora_A.weight")]
    assert not any(torch.equal(a[0], value) for value in a[1:] if value.shape == a[0].shape)


def test_digest_sees_names_shapes_and_bits() -> None:
    state = {"a": torch.zeros(2, 3), "b": torch.ones(3)}
    assert lora.digest(state) == lora.digest(dict(reversed(state.items())))
    assert len(lora.digest(state)) == 16
    changed = [
        {"a": torch.zeros(3, 2), "b": torch.ones(3)},
        {"a": torch.zeros(2, 3), "c": torch.ones(3)},
        {"a": torch.zeros(2, 3), "b": torch.nextafter(torch.ones(3), torch.full((3,), 2.0))},
        {"a": torch.zeros(2, 3)},
    ]
    assert len({lora.digest(state), *map(lora.digest, changed)}) == 5


@pytest.mark.parametrize("dtype", list(DType))
def test_it_comes_back_from_its_file_to_the_bit(folder: Path, tmp_path: Path, dtype: DType) -> None:
    policy = load(folder, dtype=dtype, rank=4, alpha=6.0)
    policy.load_lora_state(noisy(policy.lora_state()))
    state = policy.lora_state()
    assert all(value.dtype == policy.arithmetic for value in state.values())
    policy.save_lora(tmp_path)
    again = load(folder, seed=99, dtype=dtype, rank=4, alpha=6.0, init_from=str(tmp_path)).lora_state()
    from_file = load(folder, seed=99, dtype=dtype, rank=4, alpha=6.0, init_from=str(tmp_path / WEIGHT_NAME))
    assert list(again) == list(state) and all(torch.equal(again[name], state[name]) for name in state)
    assert lora.digest(from_file.lora_state()) == lora.digest(state)


def test_diffusers_reads_weights_and_scaling(folder: Path, tmp_path: Path) -> None:
    policy = load(folder, rank=4, alpha=6.0)
    policy.load_lora_state(noisy(policy.lora_state()))
    policy.save_lora(tmp_path)
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    pipe.load_lora_weights(tmp_path, adapter_name=lora.ADAPTER)
    loaded = lora.parameters(pipe.unet)
    assert loaded.keys() == policy.lora_parameters().keys()
    assert all(torch.equal(loaded[name], value) for name, value in policy.lora_state().items())
    layers = [module for module in pipe.unet.modules() if isinstance(module, LoraLayer)]
    assert layers and all(layer.scaling == {lora.ADAPTER: 1.5} for layer in layers)
    with safe_open(tmp_path / WEIGHT_NAME, framework="pt") as file:
        assert all(name.startswith("unet.") for name in file.keys())  # noqa: SIM118


def test_a_lora_saved_by_older_diffusers_is_read(folder: Path, tmp_path: Path) -> None:
    """Names ending in lora.down and lora.up, and no metadata: alpha is then the rank."""
    policy = load(folder)
    policy.load_lora_state(noisy(policy.lora_state()))
    old = {
        "unet." + name.replace("lora_A", "lora.down").replace("lora_B", "lora.up"): value
        for name, value in policy.lora_state().items()
    }
    save_file(old, tmp_path / WEIGHT_NAME)
    again = load(folder, init_from=str(tmp_path))
    assert lora.digest(again.lora_state()) == lora.digest(policy.lora_state())


def test_a_lora_in_kohyas_layout_is_read(folder: Path, tmp_path: Path) -> None:
    """Underscores for dots, lora_down and lora_up, an alpha for every layer."""
    policy = load(folder, alpha=2.0)
    policy.load_lora_state(noisy(policy.lora_state()))
    file = {}
    for name, value in policy.lora_state().items():
        layer, _, end = name.rpartition(".lora_")
        layer = "lora_unet_" + layer.replace(".", "_")
        file[f"{layer}.lora_{'down' if end[0] == 'A' else 'up'}.weight"] = value
        file[f"{layer}.alpha"] = torch.tensor(2.0)
    save_file(file, tmp_path / "kohya.safetensors")
    again = load(folder, alpha=2.0, init_from=str(tmp_path / "kohya.safetensors"))
    assert lora.digest(again.lora_state()) == lora.digest(policy.lora_state())
    unscaled = load(folder, init_from=str(tmp_path / "kohya.safetensors"))  # the same function at alpha = rank
    for name, value in policy.lora_state().items():
        scale = 2.0 / 8 if ".lora_B." in name else 1.0
        torch.testing.assert_close(unscaled.lora_state()[name], scale * value, rtol=0, atol=0)


def test_what_the_learner_trains(folder: Path) -> None:
    sampler, learner = load(folder), load(folder, trainable=True)
    assert not any(parameter.requires_grad for parameter in sampler.family.network.parameters())
    trained = [name for name, p in learner.family.network.named_parameters() if p.requires_grad]
    assert len(trained) == len(learner.lora_parameters()) and all(".lora_" in name for name in trained)
    with learner.base():
        pass
    assert all(parameter.requires_grad for parameter in learner.lora_parameters().values())
    with sampler.base():
        pass
    assert not any(parameter.requires_grad for parameter in sampler.lora_parameters().values())


def test_lora_state_is_a_copy(folder: Path) -> None:
    policy = load(folder, trainable=True)
    state = policy.lora_state()
    kept = {name: value.clone() for name, value in state.items()}
    with torch.no_grad():
        for parameter in policy.lora_parameters().values():
            parameter.add_(1)
    assert all(torch.equal(state[name], kept[name]) for name in kept)


def test_gradient_checkpointing_changes_no_number(folder: Path) -> None:
    plain, checkpointed = (load(folder, trainable=True, gradient_checkpointing=on) for on in (False, True))
    for policy in (plain, checkpointed):
        policy.load_lora_state(noisy(policy.lora_state()))
    assert checkpointed.family.network.is_gradient_checkpointing
    assert torch.equal(plain.log_prob(*inputs(plain)), checkpointed.log_prob(*inputs(checkpointed)))
    torch.testing.assert_close(gradient(plain), gradient(checkpointed), rtol=1e-5, atol=1e-7)


def test_the_conditional_gradient_has_the_same_values_and_leaves_out_a_half(folder: Path) -> None:
    policy = load(folder, trainable=True, dtype=DType.float64)
    policy.load_lora_state(noisy(policy.lora_state()))
    x, x_next, index, embeds = inputs(policy)
    full = policy.log_prob(x, x_next, index, embeds, GuidanceGradient.full)
    conditional = policy.log_prob(x, x_next, index, embeds, GuidanceGradient.conditional)
    assert torch.equal(full, conditional)
    assert not torch.allclose(gradient(policy, "full"), gradient(policy, "conditional"))

    # d/dLoRA of log p(guided) is d/dconditional + d/dunconditional; with the empty prompt as the prompt both halves
    # are the same function f, guided = f + 3 (f - f), so the whole gradient is f's and the conditional one 3 times it
    (empty,) = policy.prompts([""])
    policy.prompts = PromptCache(lambda prompts: iter([empty] * len(prompts)))
    torch.testing.assert_close(gradient(policy, "conditional"), 3 * gradient(policy, "full"), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("dtype", [DType.float16, DType.bfloat16])
def test_gradients_survive_half_precision(folder: Path, dtype: DType) -> None:
    """At 1/3200 of a mean over dimensions, a float16 network would lose them all without scaling."""
    half, full = load(folder, trainable=True, dtype=dtype), load(folder, trainable=True)
    for policy in (half, full):
        policy.load_lora_state(noisy(policy.lora_state(), 0.05))
    arguments = inputs(full)

    def at(policy: Policy) -> torch.Tensor:
        loss = policy.log_prob(*arguments[:3], policy.encode(["a cat", "two dog"] * 2)) @ torch.tensor(
            [1.0, -2, 0.5, 1]
        )
        found = torch.autograd.grad(loss / 3200, list(policy.lora_parameters().values()))
        return torch.cat([g.flatten() for g in found])

    a, b = at(half), at(full)
    assert a.dtype == torch.float32
    assert torch.cosine_similarity(a, b, dim=0) > 0.98
    assert 0.9 < (a.norm() / b.norm()).item() < 1.1


def test_load_lora_state_is_strict(folder: Path) -> None:
    policy = load(folder)
    state = policy.lora_state()
    name = next(iter(state))
    before = lora.digest(state)
    for wrong, message in (
        ({k: v for k, v in state.items() if k != name}, "is missing"),
        (state | {"mid.lora_A.weight": torch.zeros(1)}, "has no place"),
        (state | {name: torch.zeros(3, 3)}, "has shape"),
    ):
        with pytest.raises(ValueError, match=message):
            policy.load_lora_state(wrong)
    assert lora.digest(policy.lora_state()) == before


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"targets": ["to_q", "to_w"]}, ["'to_w'", "to_out.0", "to_v"]),
        ({"targets": []}, ["model.lora.targets"]),
        ({"rank": 0}, ["model.lora.rank=0"]),
        ({"init_from": "/nowhere/lora"}, ["/nowhere/lora"]),
        ({"init_from": ""}, ["model.lora.init_from=;"]),
        ({"targets": ["0"]}, ["'0'", "to_out.0"]),
        ({"targets": ["7"]}, ["'7'", "to_out.0"]),
        ({"targets": [""]}, ["''", "to_q"]),
        ({"targets": ["TO_Q"]}, ["'TO_Q'", "to_q"]),
        ({"targets": [".to_q"]}, ["'.to_q'", "to_q"]),
        ({"targets": ["to_(q|k)"]}, ["'to_(q|k)'", "to_q"]),
        ({"targets": [".*"]}, ["'.*'", "to_q"]),
        ({"targets": ["to_q "]}, ["'to_q '", "to_q"]),
        ({"targets": ["to q"]}, ["'to q'", "to_q"]),
        ({"targets": ["to_q,to_k"]}, ["'to_q,to_k'", "to_q"]),
        ({"targets": ["all-linear"]}, ["'all-linear'", "to_q"]),
        ({"targets": ["norm1"]}, ["'norm1'", "Norm", "to_q"]),
        ({"targets": ["to_q", "attn1"]}, ["'attn1'", "a Attention", "to_q"]),
        ({"targets": ["time_embedding"]}, ["'time_embedding'", "TimestepEmbedding", "linear_1"]),
        ({"targets": ["to_q" * 1000]}, ["to_q"]),
    ],
)
def test_impossible_settings_are_refused(folder: Path, settings: dict, names: list[str]) -> None:
    with pytest.raises(UserError) as refusal:
        load(folder, **settings)
    assert all(name in str(refusal.value) for name in names) and "\n" not in str(refusal.value)
    assert len(str(refusal.value)) <= 500
    with pytest.raises(UserError) as at_once:  # before anything starts, by the same words
        check_lora(ModelConfig(str(folder), lora=LoraConfig(**settings)))
    assert str(at_once.value) == str(refusal.value)


@pytest.mark.parametrize(
    "targets", [["to_q", "to_q"], ["conv_in", "conv1", "net.2"], ["mid_block.attentions.0.proj_in"]]
)
def test_targets_that_are_projections_are_accepted(folder: Path, targets: list[str]) -> None:
    check_lora(ModelConfig(str(folder), lora=LoraConfig(targets=targets)))
    names = {name.rpartition(".lora_")[0] for name in load(folder, targets=targets).lora_state()}
    assert all(any(name == t or name.endswith(f".{t}") for t in targets) for name in names)
    assert all(any(name == t or name.endswith(f".{t}") for name in names) for t in targets)


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"rank": 8}, ["rank 4", "model.lora.rank=8"]),
        ({"rank": 4, "alpha": 4.0, "targets": ["to_q"]}, ["targets", "no place"]),
    ],
)
def test_a_lora_that_does_not_fit_is_refused(folder: Path, tmp_path: Path, settings: dict, names: list[str]) -> None:
    load(folder, rank=4, alpha=4.0).save_lora(tmp_path)
    with pytest.raises(UserError) as refusal:
        load(folder, init_from=str(tmp_path), **settings)
    assert all(name in str(refusal.value) for name in names) and "\n" not in str(refusal.value)


def test_a_file_that_is_no_unet_lora_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / WEIGHT_NAME).write_bytes(b"not a safetensors file")
    with pytest.raises(UserError, match="cannot be read"):
        load(folder, init_from=str(tmp_path))
    load(folder).save_lora(tmp_path)
    state = load_file(tmp_path / WEIGHT_NAME) | {"text_encoder.q.lora_A.weight": torch.zeros(8, 4)}
    save_file(state, tmp_path / WEIGHT_NAME)
    with pytest.raises(UserError, match="text_encoder"):
        load(folder, init_from=str(tmp_path))
