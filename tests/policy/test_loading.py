"""Loading: a model that cannot be a policy is refused in one sentence, before anything heavy where possible."""

import contextlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from common.errors import UserError
from common.precision import exact_float32
from conf.schema import DType, ModelConfig, SamplingConfig
from policy.check import check_policy
from policy.families.stable_diffusion import StableDiffusion
from policy.policy import Policy
from policy.source import check_model, family_of
from tests.pipelines import edit_json, tiny_pipeline
from tests.running import ROOT

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline(tmp_path_factory.mktemp("model") / "pipeline")


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as raised:
        call()
    sentence = str(raised.value)
    assert "\n" not in sentence and sentence.endswith(".")
    return sentence


def image_size(model: ModelConfig) -> tuple[int, int]:
    return StableDiffusion.check(model, SamplingConfig())


def load(model: ModelConfig, **sampling: Any) -> Policy:
    return Policy.load(model, SamplingConfig(**{"steps": 6, **sampling}), 0, "cpu", trainable=False)


def drop(name: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return spoil


def pickles_only(folder: Path) -> None:
    for part in ("unet", "vae"):
        (folder / part / "diffusion_pytorch_model.safetensors").rename(folder / part / "diffusion_pytorch_model.bin")


def fp16_only(folder: Path) -> None:
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    file.rename(file.with_name("diffusion_pytorch_model.fp16.safetensors"))


def not_json(folder: Path) -> None:
    (folder / "model_index.json").write_text("{")


def sdxl(folder: Path) -> None:
    edit_json(folder / "model_index.json", _class_name="StableDiffusionXLPipeline")


SPOILED_FOLDERS = [
    (drop("model_index.json"), "model_index.json"),
    (not_json, "not valid JSON"),
    (sdxl, "StableDiffusionXLPipeline"),
    (drop("vae"), "no weights in vae/"),
    (drop("text_encoder/model.safetensors"), "no weights in text_encoder/"),
    (pickles_only, "safe_serialization"),
    (fp16_only, "set model.variant"),
]


@pytest.mark.parametrize(("spoil", "names"), SPOILED_FOLDERS)
def test_a_folder_that_is_no_model_is_refused(good: Path, tmp_path: Path, spoil: Callable, names: str) -> None:
    folder = shutil.copytree(good, tmp_path / "pipeline")
    spoil(folder)
    model = ModelConfig(str(folder))
    sentence = refusal(lambda: check_model(model))
    assert names in sentence and str(folder) in sentence
    assert refusal(lambda: load(model)) == sentence


@pytest.mark.parametrize("path", ["emoji_world/no/such", "/no/such/folder", "./here", "a b/c", "", "pipeline"])
def test_what_is_neither_folder_nor_hub_id_is_refused(path: str) -> None:
    assert f"model.path={path} " in refusal(lambda: check_model(ModelConfig(path)))


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "v1-5.safetensors").write_bytes(b"")
    assert "not a folder" in refusal(lambda: check_model(ModelConfig(str(tmp_path / "v1-5.safetensors"))))


def test_a_hub_id_that_cannot_be_reached_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # what HF_HUB_OFFLINE=1 sets
    sentence = refusal(lambda: check_model(ModelConfig("nobody-at-all/no-such-model")))
    assert "model.path=nobody-at-all/no-such-model is no folder here" in sentence


def test_a_missing_variant_is_named(good: Path) -> None:
    sentence = refusal(lambda: load(ModelConfig(str(good), variant="fp16")))
    assert "model.variant=fp16" in sentence and "diffusion_pytorch_model.safetensors" in sentence


def scheduler(**changes: object) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "scheduler" / "scheduler_config.json", **changes)


def unet(**changes: object) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "unet" / "config.json", **changes)


def vae(**changes: object) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "vae" / "config.json", **changes)


def encoder(**changes: object) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "text_encoder" / "config.json", **changes)


def written(name: str, text: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / name).write_text(text)

    return spoil


def torn(folder: Path) -> None:
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def without_a_tensor(folder: Path) -> None:
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: value for name, value in load_file(file).items() if name != "conv_in.weight"}, file)


SPOILED_PARTS = [
    (scheduler(steps_offset=0), "steps_offset=0"),
    (scheduler(set_alpha_to_one=...), "set_alpha_to_one=true"),
    (scheduler(clip_sample=...), "clip_sample"),
    (scheduler(prediction_type="sample"), "'sample'"),
    (scheduler(_class_name="FlowMatchEulerDiscreteScheduler"), "FlowMatchEulerDiscreteScheduler"),
    (scheduler(beta_schedule="cosine"), "cosine"),
    (scheduler(timestep_spacing="uneven"), "uneven"),
    (drop("scheduler"), "scheduler cannot be read"),
    (drop("tokenizer"), "no vocabulary in tokenizer/"),
    (unet(out_channels=8), "unet"),
    (scheduler(_class_name=...), "_class_name"),
    (scheduler(beta_end=None), "scheduler cannot be read"),
    (scheduler(num_train_timesteps="many"), "scheduler cannot be read"),
    (scheduler(steps_offset=None), "scheduler cannot be read"),
    (scheduler(trained_betas="x"), "scheduler cannot be read"),
    (written("scheduler/scheduler_config.json", "{"), "scheduler cannot be read"),
    (written("scheduler/scheduler_config.json", "[]"), "scheduler cannot be read"),
    (written("unet/config.json", "{"), "unet cannot be read"),
    (written("unet/config.json", "[]"), "unet cannot be read"),
    (drop("unet/config.json"), "no config.json in unet/"),
    (unet(block_out_channels=...), "unet cannot be read"),
    (unet(block_out_channels=[16, 64]), "unet cannot be read"),
    (unet(down_block_types=["X", "Y"]), "unet cannot be read"),
    (unet(cross_attention_dim=...), "unet cannot be read"),
    (unet(sample_size="8"), 'sample_size="8"'),
    (unet(sample_size=0), "sample_size=0"),
    (unet(sample_size=[8]), "sample_size=[8]"),
    (written("vae/config.json", "{"), "vae cannot be read"),
    (vae(block_out_channels=...), "vae cannot be read"),
    (vae(latent_channels=8), "the VAE has 8"),
    (vae(scaling_factor=None), "scaling_factor=null"),
    (vae(scaling_factor=0), "scaling_factor=0"),
    (vae(scaling_factor=float("nan")), "scaling_factor=NaN"),
    (vae(scaling_factor=True), "scaling_factor=true"),
    (encoder(eos_token_id=None), "eos_token_id=None"),
    (encoder(eos_token_id=[1, 2]), "eos_token_id=[1, 2]"),
    (scheduler(trained_betas=[]), "has 0 trained_betas"),
    (scheduler(beta_start=float("nan")), "Alpha is no number above 0"),
    (written("text_encoder/config.json", "{"), "text_encoder cannot be read"),
    (written("text_encoder/config.json", "[]"), "text_encoder cannot be read"),
    (drop("text_encoder/config.json"), "no config.json in text_encoder/"),
    (encoder(hidden_size="x"), "text_encoder cannot be read"),
    (encoder(hidden_act="x"), "text_encoder cannot be read"),
    (encoder(hidden_size=64), "embedding"),
    (encoder(vocab_size=5), "token_embedding"),
    (encoder(num_hidden_layers=3), "layers.1."),
    (written("text_encoder/model.safetensors", ""), "text_encoder cannot be read"),
    (written("tokenizer/vocab.json", "{"), "tokenizer cannot be read"),
    (written("tokenizer/vocab.json", "[]"), "tokenizer cannot be read"),
    (written("tokenizer/merges.txt", "a\nb c d\n"), "tokenizer cannot be read"),
    (written("tokenizer/tokenizer_config.json", "{"), "tokenizer cannot be read"),
    (written("tokenizer/tokenizer_config.json", "[]"), "tokenizer cannot be read"),
    (written("model_index.json", "[]"), "holds no settings"),
    (torn, "unet cannot be read"),
    (without_a_tensor, "conv_in.weight"),
]


@pytest.mark.parametrize(("spoil", "names"), SPOILED_PARTS)
def test_a_model_with_a_part_that_cannot_be_a_policy_is_refused(
    good: Path, tmp_path: Path, spoil: Callable, names: str
) -> None:
    folder = shutil.copytree(good, tmp_path / "pipeline")
    spoil(folder)
    model = ModelConfig(str(folder))
    sentence = refusal(lambda: load(model).encode(["a cat"]))
    assert names in sentence
    assert refusal(lambda: load(model).prompts.fill(["a cat"])) == sentence


ADVISED = [
    (scheduler(steps_offset=0), {}),
    (scheduler(steps_offset=...), {}),
    (scheduler(steps_offset=-1), {}),
    (scheduler(steps_offset=5000), {}),
    (scheduler(set_alpha_to_one=True), {}),
    (scheduler(set_alpha_to_one=True, steps_offset=0), {}),
    (scheduler(timestep_spacing="linspace"), {}),
    (scheduler(timestep_spacing="linspace", steps_offset=0, set_alpha_to_one=True), {}),
    (scheduler(timestep_spacing="trailing", set_alpha_to_one=True), {"steps": 5}),
    (scheduler(timestep_spacing="trailing"), {"steps": 999}),
    (scheduler(beta_schedule="squaredcos_cap_v2", steps_offset=0), {}),
    (scheduler(trained_betas=[0.001] * 100), {}),
    (scheduler(clip_sample=...), {}),
    (scheduler(thresholding=True), {}),
    (scheduler(), {"eta": 1e-4}),
    (scheduler(steps_offset=0), {"eta": 1e-5}),
    (scheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing"), {}),
    (unet(sample_size=None), {}),
    (unet(sample_size=...), {}),
]


@pytest.mark.parametrize(("spoil", "sampling"), ADVISED)
def test_who_follows_the_advice_has_a_policy(good: Path, tmp_path: Path, spoil: Callable, sampling: dict) -> None:
    """Once is enough, and the advice is never what is set already."""
    folder = shutil.copytree(good, tmp_path / "pipeline")
    spoil(folder)
    advice = refusal(lambda: load(ModelConfig(str(folder)), **sampling)).partition("; ")[2]
    file = folder / ("unet/config.json" if "sample_size" in advice else "scheduler/scheduler_config.json")
    changes = {key: json.loads(value) for key, value in re.findall(r'"(\w+)": ([^\s,.]+)', advice)}
    if "sample_size" in advice:
        changes = {"sample_size": 64}  # "for example 64"
    before = json.loads(file.read_text())
    assert all(before.get(key, ...) != value for key, value in changes.items())
    edit_json(file, **changes)
    settings = dict(sampling) | ({"eta": 1.0} if "sampling.eta=1" in advice else {})
    assert changes or settings != sampling
    assert (load(ModelConfig(str(folder)), **settings).schedule.std > 0).all()


@pytest.mark.parametrize(("version", "size"), [("0.6.0", 8), ("0.6.0", 64), ("0.6.0", [8, 8]), ("0.9.0", 8)])
def test_pictures_are_as_large_as_the_pipeline_draws_them(
    good: Path, tmp_path: Path, version: str, size: int | list[int]
) -> None:
    folder = shutil.copytree(good, tmp_path / "pipeline")
    unet(sample_size=size, _diffusers_version=version)(folder)
    taken = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None).unet.config.sample_size
    sides = (taken, taken) if isinstance(taken, int) else tuple(taken)
    policy = load(ModelConfig(str(folder)))
    assert policy.latent_shape == (4, *sides) and policy.image_size == (8 * sides[0], 8 * sides[1])
    assert image_size(ModelConfig(str(folder))) == policy.image_size


def test_a_vae_without_a_scaling_factor_has_that_of_diffusers(good: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(good, tmp_path / "pipeline")
    vae(scaling_factor=...)(folder)
    family = StableDiffusion.load(ModelConfig(str(folder)), "cpu", decodes=True)
    assert family.scaling_factor == 0.18215


def test_tf32_is_off_whatever_the_networks_dtype() -> None:
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    exact_float32()
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize("dtype", list(DType))
def test_a_policy_on_cuda_switches_tf32_off(good: Path, dtype: DType) -> None:
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    model = ModelConfig(str(good), dtype=dtype)
    with contextlib.suppress(AssertionError, RuntimeError):  # torch without CUDA says so when weights go there
        Policy.load(model, SamplingConfig(steps=6), 0, "cuda", trainable=False)
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize(
    "name", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "PNDMScheduler", "DDPMScheduler"]
)
def test_ddim_follows_from_other_schedulers_configs(good: Path, tmp_path: Path, name: str) -> None:
    folder = shutil.copytree(good, tmp_path / "pipeline")
    expected = load(ModelConfig(str(good))).schedule
    scheduler(_class_name=name, skip_prk_steps=True, interpolation_type="linear")(folder)
    assert torch.equal(load(ModelConfig(str(folder))).schedule.std, expected.std)


@pytest.mark.parametrize(
    ("sampling", "names"),
    [
        ({"steps": 0}, "sampling.steps=0"),
        ({"eta": -0.1}, "sampling.eta=-0.1"),
        ({"guidance": 0.5}, "sampling.guidance=0.5"),
        ({"latents_dtype": DType.bfloat16}, "sampling.latents_dtype=bfloat16"),
    ],
)
def test_impossible_sampling_is_refused(good: Path, sampling: dict, names: str) -> None:
    assert names in refusal(lambda: load(ModelConfig(str(good)), **sampling))


def test_schedule_and_size_are_known_without_weights(good: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(good, tmp_path / "pipeline")
    for weights in folder.rglob("*.safetensors"):
        weights.unlink()
    model = ModelConfig(str(folder))
    assert image_size(model) == (64, 64)
    assert "sampling.eta=2" in refusal(lambda: StableDiffusion.check(model, SamplingConfig(eta=2.0)))
    unet(sample_size=[8, 16])(folder)
    assert image_size(model) == (64, 128)
    drop("unet")(folder)
    assert "unet" in refusal(lambda: image_size(model))


def test_a_family_of_the_users_own_is_found_and_says_what_its_folder_holds(good: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(good, tmp_path / "pipeline")
    sdxl(folder)
    own = ModelConfig(str(folder), family="policy.families.stable_diffusion:StableDiffusion")
    assert family_of(own) is StableDiffusion is family_of(ModelConfig(str(good)))
    check_model(own)
    own.family = "nosuch"
    assert "model.family=nosuch is neither built in (StableDiffusionPipeline) nor" in refusal(lambda: check_model(own))
    own.family = "no_such_module:Mine"
    assert "there is no module no_such_module" in refusal(lambda: check_model(own))
    assert "has no Mine" in refusal(lambda: family_of(ModelConfig(str(folder), family="policy.family:Mine")))


class Unfinished:
    """A family of which only the beginning is written."""

    prefix = "unet"

    def predict(self) -> None: ...


class Broken(StableDiffusion):
    @classmethod
    def check(cls, model: ModelConfig, sampling: SamplingConfig) -> tuple[int, int]:
        raise KeyError("size")


def test_an_unfinished_or_broken_family_is_its_authors_to_mend(good: Path) -> None:
    own = ModelConfig(str(good), family=f"{__name__}:Unfinished")
    lacks = "pipeline, check, check_prompts, without_weights, load, schedule, noise_levels, encode, decode"
    assert refusal(lambda: family_of(own)).startswith(f"model.family={__name__}:Unfinished lacks {lacks};")
    own.family = f"{__name__}:Broken"
    sentence = refusal(lambda: check_policy(own, SamplingConfig(), ["a cat"]))
    assert sentence.startswith(f"model.family={__name__}:Broken: KeyError: 'size' (test_loading.py:")


def test_checking_a_model_needs_no_torch(good: Path) -> None:
    """launch.py checks before it starts anything; importing torch and diffusers would take it seconds."""
    code = (
        "import sys; from conf.schema import ModelConfig; from policy.source import check_model; "
        f"check_model(ModelConfig({json.dumps(str(good))})); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
