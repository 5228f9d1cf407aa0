"""Trains the captioner: a LLaVA of 1.8 million parameters that answers questions about pictures.

Resumable: the same command goes on from the last checkpoint. Batches follow from the seed and the step alone.

    python -m emoji_world.pretrain_captioner
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from emoji_world.fit import fit
from emoji_world.pretrain_vae import TEST_PICTURES, to_model
from emoji_world.questions import all_texts, draw_question
from emoji_world.render import POOL, SIZE, background, load_pool
from emoji_world.train_classifier import augment
from emoji_world.word_tokenizer import END, IMAGE, make_tokenizer
from prompts.scenes import SETTINGS, Scene

WEIGHTS = Path(__file__).parent / "weights" / "captioner"
PATCH = 8  # pixels a side: what the renderer's grid makes a finite vocabulary of patches
MAX_LENGTH = 128
EMPTY_SHARE = 0.08  # of the training pictures: settings without an animal, and nothing at all
TEMPLATE = (
    "{% for message in messages %}{{ message.role | upper }}: "
    "{% for part in message.content %}{% if part.type == 'image' %}<image> {% else %}{{ part.text }} {% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def make_processor() -> LlavaProcessor:
    texts = [*all_texts(), "USER: ASSISTANT:"]
    images = CLIPImageProcessor(
        size={"height": SIZE, "width": SIZE},
        do_center_crop=False,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=make_tokenizer(texts, MAX_LENGTH, ends=False),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
        image_token=IMAGE,
    )


def make_captioner(tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    vision = CLIPVisionConfig(
        image_size=SIZE,
        patch_size=PATCH,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=2 * MAX_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=(SIZE // PATCH) ** 2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    return LlavaForConditionalGeneration(config)


def empty_pictures(count: int, rng: np.random.Generator) -> tuple[np.ndarray, list[Scene | None]]:
    """Settings without an animal, and now and then a plain colour with more or less noise: uint8 [count, 64, 64, 3]."""
    images, scenes = [], []
    for _ in range(count):
        if rng.random() < 0.7:
            setting = list(SETTINGS)[rng.integers(len(SETTINGS))]
            picture, scene = background(setting, rng), Scene("", 0, setting)
        else:
            noise = rng.normal(size=(SIZE, SIZE, 3)) * rng.uniform(0, 0.4)
            picture, scene = rng.random(3) + noise, None
        images.append((picture.clip(0, 1) * 255 + 0.5).astype(np.uint8))
        scenes.append(scene)
    return np.stack(images), scenes


def conversation(processor: LlavaProcessor, scenes: list[Scene | None], rng: np.random.Generator) -> dict:
    """Token ids, mask and labels of a question and its answer for each picture; labels are -100 but for answers."""
    questions, answers = zip(*(draw_question(scene, rng) for scene in scenes), strict=True)
    image = IMAGE * (SIZE // PATCH) ** 2
    asked = [f"USER: {image} {question} ASSISTANT:" for question in questions]
    tokenizer = processor.tokenizer
    whole = tokenizer([f"{q} {a}{END}" for q, a in zip(asked, answers, strict=True)], padding=True, return_tensors="pt")
    lengths = torch.tensor([len(ids) for ids in tokenizer(asked).input_ids])
    positions = torch.arange(whole.input_ids.shape[1])
    labels = whole.input_ids.masked_fill((positions < lengths[:, None]) | (whole.attention_mask == 0), -100)
    return {"input_ids": whole.input_ids, "attention_mask": whole.attention_mask, "labels": labels}


def train(steps: int, batch: int, lr: float, seed: int, folder: Path, out: Path) -> None:
    images, scenes = load_pool(folder)
    count = len(images) - TEST_PICTURES
    torch.manual_seed(seed)
    processor = make_processor()
    model = make_captioner(processor.tokenizer)
    empty = round(EMPTY_SHARE * batch)

    def loss_at(_: int, rng: np.random.Generator) -> torch.Tensor:
        index = np.sort(rng.integers(0, count, batch - empty))
        blank, unlabelled = empty_pictures(empty, rng)
        pixels = augment(to_model(np.concatenate([images[index], blank])), rng)
        texts = conversation(processor, [*(scenes[i] for i in index), *unlabelled], rng)
        loss: torch.Tensor = model(pixel_values=pixels, **texts).loss
        return loss

    fit(model, loss_at, steps, lr, seed, folder / "captioner.pt")
    model.to(torch.float16).save_pretrained(out)
    processor.save_pretrained(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=POOL, help="pictures and checkpoints")
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    args = parser.parse_args()
    torch.set_num_threads(2)
    train(args.steps, args.batch, args.lr, args.seed, args.folder, args.out)
