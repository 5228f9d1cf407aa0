"""Prompts as the model reads them: what is cut, what is the same, and embeddings of several vectors."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

from common.errors import UserError
from conf.prompts import resolve_prompts
from conf.schema import ModelConfig, PromptsConfig, SamplingConfig
from policy.families.clip_tokens import Tokens
from policy.families.stable_diffusion import StableDiffusion
from policy.policy import Policy
from prompts.sets import named_sets
from tests.pipelines import edit_json, tiny_pipeline

LONG = "a cat " * 60


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline(tmp_path_factory.mktemp("model") / "pipeline")


@pytest.fixture(scope="module")
def inverted(good: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved pipeline with learned embeddings: <x> of three vectors and <y> of one."""
    folder = shutil.copytree(good, tmp_path_factory.mktemp("inverted") / "pipeline")
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    torch.manual_seed(5)
    for token, vectors in (("<x>", 3), ("<y>", 1)):
        pipe.load_textual_inversion({token: torch.randn(vectors, 32)}, token=token)
    pipe.save_pretrained(folder)
    file = folder / "text_encoder" / "model.safetensors"
    save_file({n: v for n, v in load_file(file).items() if "position_ids" not in n}, file, metadata={"format": "pt"})
    return folder


def load(folder: Path) -> Policy:
    return Policy.load(ModelConfig(str(folder)), SamplingConfig(steps=4), 0, "cpu", trainable=False)


@pytest.mark.parametrize("prompt", ["a <x> on the beach", "<x>", "<x> <y> <x>", "a cat", "", LONG + "<x>"])
def test_prompts_are_encoded_as_diffusers_does(inverted: Path, prompt: str) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(inverted, safety_checker=None)
    expected, _ = pipe.encode_prompt(prompt, "cpu", 1, do_classifier_free_guidance=False)
    (embeddings,) = load(inverted).encode([prompt])
    torch.testing.assert_close(embeddings, expected, rtol=1e-5, atol=1e-6)


def test_all_vectors_of_an_embedding_are_read(inverted: Path) -> None:
    tokens = Tokens.load(ModelConfig(str(inverted)))
    assert tokens.expanded("a <x> and <y>") == "a <x> <x>_1 <x>_2 and <y>"
    with pytest.raises(UserError, match=r"Prompts 1 .'a <x>'. and 2 .'A <x>'. are the same"):
        tokens.check(["a <x>", "A <x>"])


def test_what_is_cut_is_said_once(good: Path) -> None:
    model = ModelConfig(str(good))
    assert StableDiffusion.check_prompts(model, ["a cat", "two dog"]) == []
    (sentence,) = StableDiffusion.check_prompts(model, ["a cat", f"{LONG} first", f"dog {LONG}"])
    assert sentence.startswith("2 of 3 prompts are longer than the 77 tokens") and "'a cat a cat" in sentence
    assert "of 127 tokens" in sentence and len(sentence) <= 500


SAME = [
    ("a cat", "A CAT"),
    ("a cat", "a  cat"),
    ("a cat", "a\tcat"),
    ("a cat", " a cat "),
    ("a cat", "a\u00a0cat"),
    ("a cat.", "a cat ."),
    (LONG + "on the beach", LONG + "riding a bike"),
    (LONG[:223], LONG),
]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_prompts_that_are_one_to_the_model_are_refused(good: Path, one: str, other: str) -> None:
    for prompts in (["two dog", one, other], ["two dog", other, one]):
        with pytest.raises(UserError) as raised:
            StableDiffusion.check_prompts(ModelConfig(str(good)), prompts)
        sentence = str(raised.value)
        assert "Prompts 2 (" in sentence and " and 3 (" in sentence and "\n" not in sentence and len(sentence) <= 500
        assert repr(prompts[1][:20])[:-1] in sentence and repr(prompts[2][:20])[:-1] in sentence
        assert ("cut after 77 tokens" in sentence) == (len(other) > 100)


def test_accents_that_are_written_in_two_ways_are_one_prompt() -> None:
    """For the shipped model, whose vocabulary has all bytes."""
    model = ModelConfig()
    assert StableDiffusion.check_prompts(model, ["a café", "a cafe"]) == []
    with pytest.raises(UserError, match="are the same"):
        StableDiffusion.check_prompts(model, ["a caf\u00e9", "a cafe\u0301"])


@pytest.mark.parametrize("name", sorted(named_sets()))
def test_every_named_set_is_of_different_prompts_to_the_shipped_model(name: str) -> None:
    StableDiffusion.check_prompts(ModelConfig(), resolve_prompts(PromptsConfig(set=name)))


@pytest.mark.long
@pytest.mark.parametrize("value", [..., 1e30, 10**30, None, 512, 77], ids=str)
def test_a_tokenizer_without_a_maximum_takes_what_the_text_encoder_takes(
    good: Path, tmp_path: Path, value: Any
) -> None:
    folder = shutil.copytree(good, tmp_path / "pipeline")
    edit_json(folder / "tokenizer" / "tokenizer_config.json", model_max_length=value)
    assert Tokens.load(ModelConfig(str(folder))).length == 77
    (made,), (expected,) = (load(path).encode(["a cat", LONG]) for path in (folder, good))
    assert torch.equal(made, expected)


def test_a_smaller_maximum_is_kept(good: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(good, tmp_path / "pipeline")
    edit_json(folder / "tokenizer" / "tokenizer_config.json", model_max_length=20)
    (embeddings,) = load(folder).encode(["a cat"])
    assert embeddings.shape == (1, 20, 32)


@pytest.mark.parametrize("value", [0, -1, 2, "77", [77]], ids=str)
def test_a_maximum_that_is_none_is_refused_with_one_that_works(good: Path, tmp_path: Path, value: Any) -> None:
    folder = shutil.copytree(good, tmp_path / "pipeline")
    edit_json(folder / "tokenizer" / "tokenizer_config.json", model_max_length=value)
    with pytest.raises(UserError) as raised:
        load(folder)
    assert f"model_max_length={value!r}" in str(raised.value) and "set it to 77" in str(raised.value)
    edit_json(folder / "tokenizer" / "tokenizer_config.json", model_max_length=77)
    load(folder)


def test_a_token_that_the_text_encoder_does_not_know_is_refused_where_it_is_used(good: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(good, tmp_path / "pipeline")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    tokenizer.add_tokens("<new>")
    tokenizer.save_pretrained(folder / "tokenizer")
    assert StableDiffusion.check_prompts(ModelConfig(str(folder)), ["a cat"]) == []
    with pytest.raises(UserError, match=r"Prompt 2 .'a <new> cat'. has a token"):
        StableDiffusion.check_prompts(ModelConfig(str(folder)), ["a cat", "a <new> cat"])


def test_the_text_encoders_mask_is_used_where_its_config_says_so(good: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(good, tmp_path / "pipeline")
    edit_json(folder / "text_encoder" / "config.json", use_attention_mask=True)
    config = json.loads((folder / "text_encoder" / "config.json").read_text())
    assert config["use_attention_mask"]
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    expected, _ = pipe.encode_prompt("a cat", "cpu", 1, do_classifier_free_guidance=False)
    (embeddings,) = load(folder).encode(["a cat"])
    torch.testing.assert_close(embeddings, expected, rtol=1e-5, atol=1e-6)
