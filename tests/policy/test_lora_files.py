"""LoRA files of every kind: a run starts as what diffusers draws with the file, or says what the file holds."""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from common.errors import UserError
from conf.schema import LoraConfig, ModelConfig, SamplingConfig
from policy import lora
from policy.check import check_lora
from policy.families.stable_diffusion import StableDiffusion
from policy.policy import Policy
from policy.rollout import rollout
from policy.source import WEIGHT_NAME
from tests.pipelines import tiny_pipeline

pytestmark = pytest.mark.long

PROMPTS, SEEDS, STEPS, GUIDANCE = ["a cat on the beach", "two dog"], [3, 4], 4, 3.0
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
ALL = [*ATTENTION, "proj_in", "proj_out", "conv1", "conv2", "proj", "net.2", "conv_in"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline(tmp_path_factory.mktemp("model") / "pipeline")


@pytest.fixture(scope="module")
def base(folder: Path) -> np.ndarray:
    return drawn(folder, lambda pipe: None)


def settings(rank: int = 4, alpha: float = 8.0, targets: list[str] = ATTENTION) -> dict[str, Any]:
    return {"rank": rank, "alpha": alpha, "targets": targets}


def started(folder: Path, init_from: Path, **lora_settings: Any) -> Policy:
    model = ModelConfig(str(folder), lora=LoraConfig(**settings(**lora_settings), init_from=str(init_from)))
    check_lora(model)
    return Policy.load(model, SamplingConfig(steps=STEPS, guidance=GUIDANCE), 0, "cpu", trainable=False)


def drawn(folder: Path, load: Callable[[StableDiffusionPipeline], None]) -> np.ndarray:
    """Pictures by diffusers' own pipeline, float [n, H, W, 3] in 0..255."""
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    load(pipe)
    return np.stack(
        [
            np.asarray(
                pipe(
                    prompt,
                    num_inference_steps=STEPS,
                    guidance_scale=GUIDANCE,
                    eta=1.0,
                    generator=torch.Generator().manual_seed(seed),
                ).images[0],
                dtype=float,
            )
            for prompt, seed in zip(PROMPTS, SEEDS, strict=True)
        ]
    )


def lora_at(path: Path) -> Callable[[StableDiffusionPipeline], None]:
    return lambda pipe: pipe.load_lora_weights(path)


def weights(folder: Path, rank: int = 4, targets: list[str] = ATTENTION, seed: int = 0) -> dict[str, Tensor]:
    """A LoRA that moves pictures, by peft's names."""
    model = ModelConfig(str(folder), lora=LoraConfig(rank=rank, targets=targets))
    policy = Policy.load(model, SamplingConfig(steps=STEPS), 0, "cpu", trainable=False)
    generator = torch.Generator().manual_seed(seed)
    return {n: v + 0.15 * torch.randn(v.shape, generator=generator) for n, v in policy.lora_state().items()}


def kohya(state: dict[str, Tensor], alphas: dict[str, float] | float | None) -> dict[str, Tensor]:
    file = {}
    for name, value in state.items():
        layer, _, end = name.rpartition(".lora_")
        flat = "lora_unet_" + layer.replace(".", "_")
        file[f"{flat}.lora_{'down' if end[0] == 'A' else 'up'}.weight"] = value
        alpha = alphas.get(layer) if isinstance(alphas, dict) else alphas
        if alpha is not None:
            file[f"{flat}.alpha"] = torch.tensor(float(alpha))
    return file


def unet(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"unet.{name}": value for name, value in state.items()}


def processors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`unet.save_attn_procs` of diffusers before 0.20."""
    renamed = {}
    for name, value in state.items():
        layer, _, end = name.rpartition(".lora_")
        block, _, projection = layer.removesuffix(".0").rpartition(".")
        renamed[f"{block}.processor.{projection}_lora.{'down' if end[0] == 'A' else 'up'}.weight"] = value
    return renamed


def dotted(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n.replace("lora_A", "lora.down").replace("lora_B", "lora.up"): v for n, v in state.items()}


def metadata(rank: int = 4, alpha: float = 8.0, **changes: Any) -> dict[str, str]:
    """As diffusers writes it, for a file with the prefix "unet."."""
    config = PeftLoraConfig(r=rank, lora_alpha=alpha, target_modules=ATTENTION).to_dict() | changes
    plain = {f"unet.{k}": sorted(v) if isinstance(v, set) else v for k, v in config.items()}
    return {"format": "pt", "lora_adapter_metadata": json.dumps(plain, default=str)}


def half_rank(state: dict[str, Tensor], which: str, rank: int = 2) -> dict[str, Tensor]:
    """The layers whose names hold `which` get fewer ranks."""
    cut = {}
    for name, value in state.items():
        few = which in name
        cut[name] = (value[:rank] if ".lora_A." in name else value[:, :rank].contiguous()) if few else value
    return cut


def layers(state: dict[str, Tensor]) -> list[str]:
    return sorted({name.rpartition(".lora_")[0] for name in state})


@dataclass
class Kind:
    name: str
    tensors: Callable[[dict[str, Tensor]], dict[str, Tensor]]
    metadata: dict[str, str] | None = None
    run: dict[str, Any] = field(default_factory=dict)
    of: dict[str, Any] = field(default_factory=dict)  # what of the LoRA itself
    unprefixed: bool = False  # diffusers reads it by pipe.unet.load_lora_adapter(file, prefix=None)
    nothing: bool = False  # draws as the base model


READ = [
    Kind("diffusers, without metadata", unet),
    Kind("diffusers, alpha in its metadata", unet, metadata(alpha=12.0)),
    Kind("rank-stabilised", unet, metadata(alpha=2.0, use_rslora=True)),
    Kind("alpha that is no power of two", unet, metadata(alpha=7.3), {"alpha": 3.1}),
    Kind(
        "alpha for each layer in the metadata",
        unet,
        metadata(alpha=4.0, alpha_pattern={"attn1.to_q": 12.0, "attn2.to_v": 1.0}),
    ),
    Kind(
        "rank for each layer in the metadata",
        lambda state: unet(half_rank(state, "attn1.to_q")),
        metadata(alpha=6.0, rank_pattern={"attn1.to_q": 2}),
    ),
    Kind("mixed ranks without metadata", lambda state: unet(half_rank(state, "to_k"))),
    Kind(
        "rank-stabilised with mixed ranks",
        lambda state: unet(half_rank(state, "attn1.to_q")),
        metadata(alpha=3.0, use_rslora=True, rank_pattern={"attn1.to_q": 2}),
    ),
    Kind("initialised otherwise", unet, metadata(init_lora_weights="gaussian")),
    Kind("old diffusers' lora.down and lora.up", lambda state: unet(dotted(state))),
    Kind("old attention processors", lambda state: unet(processors(state))),
    Kind("without a prefix", lambda state: state, unprefixed=True),
    Kind("lora.down and lora.up without a prefix", dotted, unprefixed=True),
    Kind("attention processors without a prefix", processors, unprefixed=True),
    Kind("kohya, one alpha", lambda state: kohya(state, 2.0)),
    Kind("kohya without alphas", lambda state: kohya(state, None)),
    Kind("kohya, alpha 0", lambda state: kohya(state, 0.0), nothing=True),
    Kind("kohya, an alpha for each layer", lambda s: kohya(s, {n: 1.0 + i % 3 for i, n in enumerate(layers(s))})),
    Kind("kohya, an alpha for some layers", lambda s: kohya(s, {n: 2.0 for n in layers(s) if "attn1" in n})),
    Kind("kohya, another rank in some layers", lambda s: kohya(half_rank(s, "to_v"), 2.0)),
    Kind(
        "kohya, other ranks and alphas",
        lambda s: kohya(half_rank(s, "to_v"), {n: 1.0 if "to_v" in n else 4.0 for n in layers(s)}),
    ),
    Kind("kohya's metadata", lambda state: kohya(state, 2.0), {"ss_network_alpha": "16", "ss_network_dim": "32"}),
    Kind("half precision", lambda s: {n: v.half() for n, v in unet(s).items()}, metadata(alpha=12.0)),
    Kind("bfloat16", lambda s: {n: v.bfloat16() for n, v in kohya(s, 4.0).items()}),
    Kind("float64", lambda s: {n: v.double() for n, v in unet(s).items()}),
    Kind("fewer targets than the run", unet, None, {}, {"targets": ["to_q"]}),
    Kind("one layer", lambda s: {n: v for n, v in unet(s).items() if "mid_block" in n and "attn2.to_v" in n}),
    Kind("convolutions and all", unet, None, {"targets": ALL}, {"targets": ALL}),
    Kind("convolutions of kohya", lambda s: kohya(s, 3.0), None, {"targets": ALL}, {"targets": ALL}),
    Kind("another rank, as the run's", unet, None, {"rank": 3, "alpha": 5.0}, {"rank": 3}),
]


@pytest.mark.parametrize("kind", READ, ids=lambda kind: kind.name)
def test_a_run_starts_as_what_diffusers_draws_with_the_file(
    folder: Path, base: np.ndarray, tmp_path: Path, kind: Kind
) -> None:
    file = tmp_path / WEIGHT_NAME
    save_file(kind.tensors(weights(folder, **kind.of)), file, metadata=kind.metadata)
    expected = drawn(
        folder,
        lambda pipe: (
            pipe.unet.load_lora_adapter(str(file), prefix=None) if kind.unprefixed else pipe.load_lora_weights(tmp_path)
        ),
    )
    assert (np.abs(expected - base).mean() < 1) == kind.nothing  # the file is not nothing
    for path in (tmp_path, file):
        policy = started(folder, path, **kind.run)
    made = rollout(policy, PROMPTS, SEEDS).images.astype(float)
    assert np.abs(made - expected).mean() < 1


def test_a_lora_saved_by_peft_itself_starts_as_peft_draws_it(folder: Path, base: np.ndarray, tmp_path: Path) -> None:
    state = weights(folder)
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    wrapped = get_peft_model(pipe.unet, PeftLoraConfig(r=4, lora_alpha=12, target_modules=ATTENTION, use_rslora=True))
    wrapped.load_state_dict(
        {f"base_model.model.{n.replace('.weight', '.default.weight')}": v for n, v in state.items()}, strict=False
    )
    wrapped.save_pretrained(tmp_path)

    def load(pipe: StableDiffusionPipeline) -> None:
        pipe.unet = PeftModel.from_pretrained(pipe.unet, tmp_path).base_model.model

    expected = drawn(folder, load)
    assert np.abs(expected - base).mean() > 1
    made = rollout(started(folder, tmp_path), PROMPTS, SEEDS).images.astype(float)
    assert np.abs(made - expected).mean() < 1
    (tmp_path / "adapter_config.json").unlink()
    assert "adapter_config.json" in refusal(folder, tmp_path)


def test_layers_and_ranks_that_the_file_leaves_out_are_trained_like_the_rest(folder: Path, tmp_path: Path) -> None:
    """With A and B both 0 they would never move."""
    state = half_rank(weights(folder, targets=["to_q"]), "attn1")
    save_file(unet(state), tmp_path / WEIGHT_NAME)
    started_state = started(folder, tmp_path).lora_state()
    fresh = started(folder, tmp_path).lora_state()
    assert lora.digest(started_state) == lora.digest(fresh)  # every process starts from the same
    for name, value in started_state.items():
        if ".lora_A." in name:
            assert (value != 0).any(dim=1).all()
        elif "to_q" not in name:
            assert not value.any()
        elif "attn1" in name:
            assert not value[:, 2:].any() and value[:, :2].any()


def refusal(folder: Path, path: Path, **lora_settings: Any) -> str:
    model = ModelConfig(str(folder), lora=LoraConfig(**settings(**lora_settings), init_from=str(path)))
    sentences = []
    for load in (
        lambda: check_lora(model),
        lambda: Policy.load(model, SamplingConfig(steps=STEPS), 0, "cpu", trainable=False),
    ):
        with pytest.raises(UserError) as raised:
            load()
        sentences.append(str(raised.value))
    assert sentences[0] == sentences[1]
    assert "\n" not in sentences[0] and sentences[0].endswith(".") and len(sentences[0]) <= 500
    assert f"model.lora.init_from={path}" in sentences[0]
    return sentences[0]


def first(state: dict[str, Tensor]) -> str:
    return next(iter(state)).rpartition(".lora_")[0]


def pair(layer: str) -> dict[str, Tensor]:
    return {f"{layer}.lora_{end}.weight": torch.ones(4, 4) for end in "AB"}


REFUSED = [
    ("DoRA", lambda s: unet(s) | {f"unet.{first(s)}.lora_magnitude_vector": torch.ones(16)}, {}, "a DoRA"),
    ("kohya's DoRA", lambda s: kohya(s, 4.0) | {"lora_unet_mid_block_x.dora_scale": torch.ones(16)}, {}, "a DoRA"),
    ("LoHa", lambda s: {"lora_unet_mid_block_attentions_0_proj_in.hada_w1_a": torch.ones(4, 4)}, {}, "a LoHa"),
    ("LoKr", lambda s: {"lora_unet_mid_block_attentions_0_proj_in.lokr_w1": torch.ones(4, 4)}, {}, "a LoKr"),
    ("peft's LoKr", lambda s: {f"unet.{first(s)}.lokr_w1": torch.ones(4, 4)}, {}, "a LoKr"),
    ("OFT", lambda s: {f"unet.{first(s)}.oft_r": torch.ones(4, 4)}, {}, "an OFT"),
    ("Tucker", lambda s: kohya(s, 4.0) | {"lora_unet_conv_in.lora_mid.weight": torch.ones(4, 4)}, {}, "core matrix"),
    ("biases", lambda s: unet(s) | {f"unet.{first(s)}.lora_B.bias": torch.ones(16)}, {}, "biases"),
    ("text encoder", lambda s: unet(s) | {"text_encoder.q.lora_A.weight": torch.ones(4, 4)}, {}, "text_encoder.q"),
    ("kohya's text encoder", lambda s: {"lora_te_x.lora_down.weight": torch.ones(4, 4)}, {}, "a text encoder"),
    ("transformer", lambda s: {"transformer.x.lora_A.weight": torch.ones(4, 4)}, {}, "on a transformer"),
    ("whole layers", lambda s: unet(s) | {"unet.modules_to_save.conv_out.weight": torch.ones(4)}, {}, "whole layers"),
    ("differences", lambda s: kohya(s, 1.0) | {"lora_unet_conv_in.diff": torch.ones(4)}, {}, "whole weights"),
    ("Custom Diffusion", lambda s: {"m.attn2.processor.to_k_custom_diffusion.weight": torch.ones(4)}, {}, "Custom"),
    ("a UNet", lambda s: {"conv_in.weight": torch.ones(4)}, {}, "'conv_in.weight'"),
    ("an optimizer", lambda s: {"x.exp_avg": torch.ones(4)}, {}, "'x.exp_avg'"),
    ("something else beside", lambda s: unet(s) | {"emb.weight": torch.ones(4)}, {}, "'emb.weight'"),
    ("alphas in diffusers' layout", lambda s: unet(s) | {"unet.x.alpha": torch.ones(())}, {}, "'x.alpha'"),
    ("empty", lambda s: {}, {}, "holds nothing"),
    ("another model", lambda s: unet(pair("down_blocks.7.x")), {}, "down_blocks.7.x"),
    ("SDXL of kohya", lambda s: kohya(pair("input_blocks.4.1.proj_in"), 1.0), {}, "down_blocks.4.1."),
    ("other shapes", lambda s: {n: torch.cat([v, v], 1) if "_A" in n else v for n, v in unet(s).items()}, {}, "size"),
    ("half of a pair", lambda s: {n: v for n, v in unet(s).items() if n != min(unet(s))}, {}, "in part only"),
    ("half of kohya's pair", lambda s: {n: v for n, v in kohya(s, 1.0).items() if "lora_up" not in n}, {}, "lora_up"),
    ("not finite", lambda s: unet(s) | {min(unet(s)): torch.full_like(s[min(s)], math.nan)}, {}, "not finite"),
    ("higher rank", lambda s: unet(s), {"rank": 2}, "set model.lora.rank=4."),
    ("lower rank", lambda s: unet(s), {"rank": 8}, "set model.lora.rank=4."),
    ("more targets", lambda s: unet(s), {"targets": ["to_q"]}, "model.lora.targets=[to_k,to_out.0,to_q,to_v]."),
]  # fmt: skip


@pytest.mark.parametrize(("tensors", "run", "says"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_what_is_no_plain_lora_of_this_unet_is_refused_by_what_it_holds(
    folder: Path, tmp_path: Path, tensors: Callable, run: dict, says: str
) -> None:
    file = tmp_path / "x.safetensors"
    save_file({name: value.contiguous() for name, value in tensors(weights(folder)).items()}, file)
    assert says in refusal(folder, file, **run)


@pytest.mark.parametrize(
    "run", [{"rank": 2}, {"targets": ["to_q"]}, {"targets": ["to_q", "conv1"]}], ids=lambda run: str(run)
)
def test_the_advice_of_a_refusal_helps(folder: Path, tmp_path: Path, run: dict) -> None:
    save_file(unet(weights(folder)), tmp_path / WEIGHT_NAME)
    advice = re.search(r"set model\.lora\.(\w+)=(.*)\.$", refusal(folder, tmp_path, **run))
    assert advice is not None
    value = advice[2].strip("[]").split(",") if advice[1] == "targets" else int(advice[2])
    started(folder, tmp_path, **(run | {advice[1]: value}))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"bias": "all"}, "bias=all"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights=pissa"),
        ({"lora_dropout": 0.5}, "lora_dropout=0.5"),
        ({"modules_to_save": ["conv_in"]}, "modules_to_save=['conv_in']"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"no_such_setting": 1}, "LoraConfig"),
        ({"r": 3}, "size mismatch"),
        ({"r": "many"}, "cannot be read by diffusers"),
        ({"lora_alpha": None}, "cannot be read by diffusers"),
    ],
)
def test_settings_in_the_files_metadata_that_change_the_function_are_refused(
    folder: Path, tmp_path: Path, changes: dict, says: str
) -> None:
    save_file(unet(weights(folder)), tmp_path / WEIGHT_NAME, metadata=metadata(**changes))
    assert says in refusal(folder, tmp_path)


@pytest.mark.parametrize("text", ["{", "[1]", '"x"', "7"])
def test_metadata_that_are_no_settings_are_refused(folder: Path, tmp_path: Path, text: str) -> None:
    save_file(unet(weights(folder)), tmp_path / "x.safetensors", metadata={"lora_adapter_metadata": text})
    assert "cannot be read by diffusers" in refusal(folder, tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("x.safetensors", b"", "cannot be read"),
        ("x.safetensors", b"not a safetensors file", "cannot be read"),
        ("x.bin", b"\x80\x02}", "a pickle"),
        ("pytorch_lora_weights.bin", b"\x80\x02}", "a pickle"),
        ("x.ckpt", b"", "a pickle"),
        ("lora", b"", ".safetensors"),
        ("x.SAFETENSORS", b"", ".safetensors"),
        ("x.txt", b"", ".safetensors"),
    ],
)
def test_files_of_other_formats_are_refused(folder: Path, tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert says in refusal(folder, tmp_path / name)


def test_a_truncated_file_is_refused(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / WEIGHT_NAME
    save_file(unet(weights(folder)), file)
    file.write_bytes(file.read_bytes()[:-100])
    assert "cannot be read" in refusal(folder, tmp_path)


def test_of_a_folder_the_one_lora_is_taken_whatever_its_name(folder: Path, tmp_path: Path) -> None:
    assert "There is no LoRA" in refusal(folder, tmp_path)
    assert "There is no LoRA" in refusal(folder, tmp_path / "nowhere")
    (tmp_path / "weights.bin").write_bytes(b"")
    assert "weights.bin, a pickle" in refusal(folder, tmp_path)
    state = weights(folder)
    save_file(unet(state), tmp_path / "my lora.safetensors")
    save_file(state, tmp_path / "optimizer.safetensors")
    expected = started(folder, tmp_path).lora_state()
    save_file(unet(state), tmp_path / "another.safetensors")
    assert "2 LoRA files (another.safetensors, my lora.safetensors)" in refusal(folder, tmp_path)
    save_file(unet(state), tmp_path / WEIGHT_NAME)
    assert lora.digest(started(folder, tmp_path).lora_state()) == lora.digest(expected)


def test_what_is_handed_out_has_its_scale_in_its_weights(folder: Path, tmp_path: Path) -> None:
    """So that a program that reads no metadata draws it right, and a run that starts from it starts as this one."""
    state = weights(folder)
    config = LoraConfig(**settings(rank=4, alpha=8.0))
    lora.save(state, tmp_path / "own", config, StableDiffusion)
    lora.export(state, tmp_path / "out", config, StableDiffusion)
    own = drawn(folder, lora_at(tmp_path / "own"))
    tensors = load_file(tmp_path / "out" / WEIGHT_NAME)
    save_file(tensors, tmp_path / "bare.safetensors")  # as a program that reads no metadata sees it
    for path in (tmp_path / "out", tmp_path / "bare.safetensors"):
        made = drawn(folder, lora_at(path))
        assert np.abs(made - own).mean() < 0.01
    again = started(folder, tmp_path / "out", rank=4, alpha=8.0).lora_state()
    assert all(torch.equal(again[name], value) for name, value in state.items())  # 8/4 is a power of two: every bit
    odd = LoraConfig(**settings(rank=4, alpha=7.3))
    lora.export(state, tmp_path / "odd", odd, StableDiffusion)
    again = started(folder, tmp_path / "odd", rank=4, alpha=7.3).lora_state()
    for name, value in state.items():
        torch.testing.assert_close(again[name], value, rtol=3e-7, atol=0)


def test_a_runs_own_lora_is_read_as_it_stands_and_blamed_by_its_own_name(folder: Path, tmp_path: Path) -> None:
    state = weights(folder)
    lora.save(state, tmp_path, LoraConfig(**settings()), StableDiffusion)
    read = lora.read_own(tmp_path)
    assert read.keys() == state.keys() and all(torch.equal(read[name], value) for name, value in state.items())
    file = tmp_path / WEIGHT_NAME
    for content in (file.read_bytes()[:-10], b"", None):
        file.unlink()
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(UserError) as raised:
            lora.read_own(tmp_path)
        assert str(file) in str(raised.value) and "init_from" not in str(raised.value)
