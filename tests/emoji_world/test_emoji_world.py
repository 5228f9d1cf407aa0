"""Emoji World: captions, the split, the committed weights, and that the pictures show what their prompts say."""

import json

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from common.errors import UserError
from emoji_world.classifier import accuracy, classify
from emoji_world.judged import Judged
from prompts import scenes
from prompts.scenes import Scene, all_scenes, caption, make_manifest, parse, plural, prompt_set
from rewards.aesthetic import Aesthetic
from rewards.bert_score import BertScore
from rewards.clip_model import ClipModel
from rewards.vision_language import VisionLanguageModel
from rewards.vqa import says
from tests.running import ROOT

pytestmark = pytest.mark.long

WEIGHTS = ROOT / "emoji_world" / "weights"
PIPELINE = WEIGHTS / "pipeline"


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(PIPELINE, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_every_caption_reads_back() -> None:
    everything = all_scenes()
    assert len(everything) == 45 * 4 * 8 + 45 * 3
    captions = [caption(scene) for scene in everything]
    assert len(set(captions)) == len(everything)
    assert [parse(text) for text in captions] == everything


@pytest.mark.parametrize(
    ("text", "scene"),
    [
        ("cat", Scene("cat", 1, "")),
        ("3 Mice in space.", Scene("mouse", 3, "space")),
        ("one ant on the beach", Scene("ant", 1, "beach")),
        ("a cat is riding a bike", Scene("cat", 1, "bike")),
        ("three mice on a bike", Scene("mouse", 3, "bike")),
    ],
)
def test_captions_of_others_read_too(text: str, scene: Scene) -> None:
    assert parse(text) == scene


@pytest.mark.parametrize("text", ["", "a unicorn in the forest", "two cats in the bath"])
def test_what_is_no_caption_says_so(text: str) -> None:
    with pytest.raises(ValueError, match="not a caption of Emoji World"):
        parse(text)


def test_manifest_is_what_the_script_makes() -> None:
    assert json.loads(scenes.MANIFEST.read_text()) == make_manifest()
    with pytest.raises(ValueError, match="no prompt set 'nothing'"):
        prompt_set("nothing")


def test_held_out_prompts_share_nothing_with_finetuning() -> None:
    manifest = make_manifest()
    for kind in ("animals", "places", "activities"):
        assert not set(manifest["finetune"][kind]) & set(manifest["held_out"][kind])
    trained = [parse(prompt) for prompt in prompt_set("emoji_finetune")]
    held_out = [parse(prompt) for prompt in prompt_set("emoji_held_out")]
    assert len(set(trained)) == 48 and {s.number for s in trained} == {1, 2, 3, 4}
    assert not {s.animal for s in trained} & {s.animal for s in held_out}
    assert not {s.setting for s in trained} & {s.setting for s in held_out}


def test_weights_are_small_and_in_half_precision() -> None:
    files = list(WEIGHTS.rglob("*"))
    assert sum(f.stat().st_size for f in files if f.is_file()) < 40_000_000
    assert sum(f.stat().st_size for f in PIPELINE.rglob("*") if f.is_file()) < 25_000_000
    assert not [f for f in files if f.suffix in (".bin", ".pt", ".pkl")]
    for path in WEIGHTS.rglob("*.safetensors"):
        assert {t.dtype for t in load_file(path).values()} <= {torch.float16, torch.int64}, path.name


def test_transformers_4_can_read_them() -> None:
    assert all(key.startswith("text_model.") for key in load_file(PIPELINE / "text_encoder" / "model.safetensors"))
    assert {"vocab.json", "merges.txt", "tokenizer.json"} <= {f.name for f in (PIPELINE / "tokenizer").iterdir()}


def test_text_encoder_is_not_random(pipe: StableDiffusionPipeline) -> None:
    """A prefix that does not fit leaves random weights and only a warning."""
    saved = load_file(PIPELINE / "text_encoder" / "model.safetensors")
    loaded = pipe.text_encoder.get_input_embeddings().weight
    assert torch.equal(loaded, saved["text_model.embeddings.token_embedding.weight"].float())


def test_last_step_is_a_gaussian(pipe: StableDiffusionPipeline) -> None:
    config = pipe.scheduler.config
    assert (config.steps_offset, config.set_alpha_to_one, config.prediction_type) == (1, False, "epsilon")


def test_any_text_has_tokens(pipe: StableDiffusionPipeline) -> None:
    ids = pipe.tokenizer("Ünknown 猫, a bike!", padding="max_length", truncation=True, max_length=16).input_ids
    assert len(ids) == pipe.tokenizer.model_max_length == 16
    assert pipe.tokenizer.tokenize("three Geese riding a bike") == [
        w + "</w>" for w in "three geese riding a bike".split()
    ]


def test_classifier_names_rendered_pictures() -> None:
    from emoji_world.render import FONT_PATHS
    from emoji_world.train_classifier import unseen

    if not any(path.exists() for path in FONT_PATHS):
        pytest.skip("needs fonts-noto-color-emoji")
    assert accuracy(*unseen(200, seed=5)).all_three >= 0.95


def test_pictures_show_what_their_prompts_say(pipe: StableDiffusionPipeline) -> None:
    from emoji_world.evaluate import generate

    prompts = prompt_set("emoji_finetune")[:12] + prompt_set("emoji_held_out")[:12]
    images = generate(pipe, prompts, guidance=3.0, steps=20, seed=3)
    assert images.shape == (24, 64, 64, 3) and images.dtype == np.uint8
    right = accuracy(images, prompts)
    assert min(right.animal, right.number, right.setting) > 0.7, right


# ---- the small eyes: captioner, CLIP with its aesthetic head, text model


def test_the_captioner_agrees_with_the_judge_on_generated_pictures(pipe: StableDiffusionPipeline) -> None:
    from emoji_world.evaluate import generate
    from emoji_world.questions import CAPTION_QUESTIONS

    prompts = prompt_set("emoji_finetune")[12:24] + prompt_set("emoji_held_out")[12:24]
    images = generate(pipe, prompts, guidance=3.0, steps=20, seed=4)
    captioner = VisionLanguageModel(str(WEIGHTS / "captioner"))
    said = [parse(text) for text in captioner.answer(images, [CAPTION_QUESTIONS[0]] * len(images))]
    seen = classify(images)
    assert sum(a == b for a, b in zip(said, seen, strict=True)) >= 22
    counted = captioner.answer(images, [f"How many {plural(scene.animal)} are there?" for scene in seen])
    assert sum(says(text, str(scene.number)) for text, scene in zip(counted, seen, strict=True)) >= 22


def test_the_captioner_sees_no_animal_where_there_is_none() -> None:
    grey = np.full((2, 64, 64, 3), 128, np.uint8)
    captioner = VisionLanguageModel(str(WEIGHTS / "captioner"))
    answers = captioner.answer(grey, ["What is in this image?", "How many cats are there?"])
    assert answers == ["nothing", "zero"]


def test_the_text_model_tells_right_captions_from_wrong_ones() -> None:
    score = BertScore(str(WEIGHTS / "text"))
    for scene in all_scenes()[::97]:
        others = [Scene("cat" if scene.animal != "cat" else "dog", scene.number, scene.setting)]
        others += [Scene(scene.animal, scene.number % 4 + 1, scene.setting)]
        others += [Scene(scene.animal, scene.number, "sea" if scene.setting != "sea" else "snow")]
        candidates = [caption(scene), *map(caption, others), "nothing"]
        recalls = score.recall(candidates, [f"The image contains {caption(scene)}"] * len(candidates))
        assert recalls[0] > max(recalls[1:]) and recalls[-1] == min(recalls), (candidates, recalls)


def test_the_aesthetic_stand_in_prefers_colour(pipe: StableDiffusionPipeline) -> None:
    from emoji_world.evaluate import generate
    from emoji_world.pretrain_clip import rating

    images = generate(pipe, prompt_set("emoji_animals")[:8], guidance=3.0, steps=10, seed=5)
    grey = np.repeat(images.mean(-1, keepdims=True).round().astype(np.uint8), 3, axis=-1)
    both = np.concatenate([images, grey])
    rated = Aesthetic(str(WEIGHTS / "clip"), None, str(WEIGHTS / "aesthetic.safetensors"))(both, [""] * 16)
    assert rated[:8].mean() > rated[8:].mean() + 2
    assert np.corrcoef(rated, rating(both))[0, 1] > 0.8


def test_clip_finds_the_prompt_among_others(pipe: StableDiffusionPipeline) -> None:
    from emoji_world.evaluate import generate

    prompts = prompt_set("emoji_finetune")[:12]
    images = generate(pipe, prompts, guidance=3.0, steps=20, seed=3)
    clip = ClipModel(str(WEIGHTS / "clip"))
    nearest = (clip.embed_images(images) @ clip.embed_texts(prompts).T).argmax(dim=1)
    assert (nearest == torch.arange(12)).sum() >= 10


def test_the_judge_of_a_run_says_what_is_right_and_refuses_prompts_of_another_world() -> None:
    images = np.random.default_rng(0).integers(0, 256, (20, 64, 64, 3)).astype(np.uint8)
    prompts = [caption(scene) for scene in classify(images)[:10]] + ["two whales in the snow"] * 10
    scores = Judged()(images, prompts)
    assert scores.columns.keys() == {"animal", "number", "setting"}
    assert scores.scores[:10].all() and scores.scores.mean() == pytest.approx(accuracy(images, prompts).all_three)
    with pytest.raises(UserError, match=r"The judge knows prompts of Emoji World alone: not a caption .* 'a teapot'"):
        Judged()(images, ["a teapot"] * 20)
