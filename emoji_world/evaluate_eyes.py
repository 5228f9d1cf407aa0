"""How well the small eyes see: the captioner, CLIP and the text model, on pictures kept for tests and generated ones.

python -m emoji_world.evaluate_eyes
"""

import argparse
import json

import numpy as np
import torch
from diffusers import StableDiffusionPipeline

from common.machine import machine_info
from common.terminal import print_anywhere
from emoji_world.classifier import classify
from emoji_world.evaluate import generate
from emoji_world.pretrain_captioner import WEIGHTS as CAPTIONER
from emoji_world.pretrain_clip import WEIGHTS as CLIP
from emoji_world.pretrain_text import WEIGHTS as TEXT
from emoji_world.pretrain_unet import WEIGHTS as PIPELINE
from emoji_world.pretrain_vae import TEST_PICTURES
from emoji_world.questions import ANIMAL_QUESTIONS, CAPTION_QUESTIONS, NUMBER_QUESTIONS, describe
from emoji_world.render import POOL, load_pool
from prompts.scenes import Scene, all_scenes, caption, parse, plural
from rewards.bert_score import BertScore
from rewards.clip_model import ClipModel
from rewards.vision_language import VisionLanguageModel
from rewards.vqa import says

REFERENCE = "The image contains two cats in the snow"
CANDIDATES = (
    "two cats in the snow",
    "three cats in the snow",
    "two dogs in the snow",
    "two cats in the desert",
    "three dogs in the desert",
    "no animal in the snow",
    "nothing",
)


def agreement(captions: list[str], scenes: list[Scene]) -> dict[str, float]:
    """Shares of captions with the right animal, number, setting, and all three; one that says no scene is wrong."""
    seen = []
    for text in captions:
        try:
            seen.append(parse(text))
        except ValueError:
            seen.append(Scene("", 0, ""))
    hits = [
        [a.animal == b.animal, a.number == b.number, a.setting == b.setting, a == b]
        for a, b in zip(seen, scenes, strict=True)
    ]
    return dict(zip(("animal", "number", "setting", "all three"), np.mean(hits, axis=0).round(4).tolist(), strict=True))


def ask(model: VisionLanguageModel, images: np.ndarray, questions: list[str]) -> list[str]:
    starts = range(0, len(images), 64)
    return [
        text for start in starts for text in model.answer(images[start : start + 64], questions[start : start + 64])
    ]


if __name__ == "__main__":
    print_anywhere()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generated", type=int, default=500)
    args = parser.parse_args()
    print(json.dumps({**vars(args), "cpu": machine_info()["cpu"]}))
    pool, all_of_them = load_pool(POOL)
    images, scenes = np.array(pool[-TEST_PICTURES:]), all_of_them[-TEST_PICTURES:]

    captioner = VisionLanguageModel(str(CAPTIONER))
    captions = ask(captioner, images, [CAPTION_QUESTIONS[0]] * len(images))
    print(f"captions of {len(images)} rendered pictures kept for tests:", agreement(captions, scenes))
    counts = ask(captioner, images, [NUMBER_QUESTIONS[0].format(animals=plural(scene.animal)) for scene in scenes])
    animals = ask(captioner, images, [ANIMAL_QUESTIONS[0]] * len(images))
    numbers = [says(text, str(scene.number)) for text, scene in zip(counts, scenes, strict=True)]
    kinds = [says(text, scene.animal) for text, scene in zip(animals, scenes, strict=True)]
    print(f"answers: number {np.mean(numbers):.4f}, animal {np.mean(kinds):.4f}")
    strangers = [plural(scenes[i - 1].animal) for i in range(len(scenes))]
    others = ask(captioner, images, [NUMBER_QUESTIONS[0].format(animals=animal) for animal in strangers])
    absent = [says(text, "zero") for i, text in enumerate(others) if scenes[i - 1].animal != scenes[i].animal]
    print(f"asked about animals that are not there, says zero: {np.mean(absent):.4f}")

    everything = all_scenes()
    asked = [everything[i] for i in np.random.default_rng(0).integers(0, len(everything), args.generated)]
    pipe = StableDiffusionPipeline.from_pretrained(PIPELINE, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    for guidance, steps in ((3.0, 20), (1.0, 3), (1.0, 2)):
        generated = generate(pipe, [caption(scene) for scene in asked], guidance, steps, seed=0)
        captions = ask(captioner, generated, [CAPTION_QUESTIONS[0]] * len(generated))
        judged = classify(generated)
        print(f"generated at guidance {guidance:g}, {steps} steps: captions against the classifier",
              agreement(captions, judged), "and against the prompts", agreement(captions, asked))  # fmt: skip

    clip = ClipModel(str(CLIP))
    pictures = torch.cat([clip.embed_images(part) for part in np.array_split(images, 8)])
    names = [describe(scene) for scene in everything]
    nearest = (pictures @ clip.embed_texts(names).T).argmax(dim=1).tolist()
    print(f"CLIP, nearest of {len(names)} captions:", agreement([names[i] for i in nearest], scenes))

    text = BertScore(str(TEXT))
    for candidate in CANDIDATES:
        print(f"BERTScore recall of {candidate!r} for {REFERENCE!r}: {text.recall([candidate], [REFERENCE])[0]:.3f}")
