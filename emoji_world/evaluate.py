"""Judges the committed pipeline: 500 pictures at guidance 3 and 20 steps, what the classifier sees, and a grid.

Beside them it judges as many rendered pictures that nothing was trained on, and the same after the autoencoder.

python -m emoji_world.evaluate
"""

import argparse
import json
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from PIL import Image

from common.machine import machine_info
from common.terminal import print_anywhere
from emoji_world.classifier import accuracy, classify
from emoji_world.pretrain_unet import WEIGHTS
from emoji_world.pretrain_vae import to_model
from emoji_world.train_classifier import unseen
from prompts.scenes import all_scenes, caption, parse

DOCS = Path("docs/images")
GRID_PROMPTS = (
    "a cat on the beach, two dogs in the snow, three foxes in the forest, four frogs in a meadow, a lion "
    "in the desert, two whales in the sea, three bats in the city, four rabbits in space, a gorilla "
    "playing chess, a llama riding a bike, a raccoon washing the dishes, a kangaroo in a meadow, two "
    "geese on the beach, three zebras in the desert, four bees in the forest, a shark in the sea, two "
    "camels in the snow, three pigs in the city, four turtles in space, a squirrel riding a bike, a horse "
    "playing chess, a turkey washing the dishes, two wolves in the forest, three ants"
).split(", ")


def generate(pipe: StableDiffusionPipeline, prompts: list[str], guidance: float, steps: int, seed: int) -> np.ndarray:
    """uint8 [B, 64, 64, 3]; picture i follows from prompt i, seed and i alone."""
    pictures = []
    for start in range(0, len(prompts), 50):
        chunk = prompts[start : start + 50]
        generators = [torch.Generator().manual_seed(seed * 1_000_003 + start + i) for i in range(len(chunk))]
        out = pipe(
            chunk,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=generators,
            output_type="np",
            height=64,
            width=64,
        )
        pictures.append((out.images * 255).round().astype(np.uint8))
    return np.concatenate(pictures)


@torch.no_grad()
def rebuild(vae: AutoencoderKL, images: np.ndarray) -> np.ndarray:
    """uint8 [B, 64, 64, 3] through the autoencoder and back, as the posterior means decode."""
    decoded = torch.cat([vae.decode(vae.encode(x).latent_dist.mode()).sample for x in to_model(images).split(50)])
    return ((decoded.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


def save_grid(images: np.ndarray, columns: int, path: Path, scale: int = 2) -> None:
    rows = [np.concatenate(list(images[i : i + columns]), 1) for i in range(0, len(images), columns)]
    grid = Image.fromarray(np.concatenate(rows, 0))
    path.parent.mkdir(parents=True, exist_ok=True)
    grid.resize((grid.width * scale, grid.height * scale), Image.Resampling.NEAREST).save(path)


if __name__ == "__main__":
    print_anywhere()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    pipe = StableDiffusionPipeline.from_pretrained(WEIGHTS, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    print(json.dumps({**vars(args), "cpu": machine_info()["cpu"]}))
    rendered, captions = unseen(args.count, args.seed)
    rebuilt = rebuild(pipe.vae, rendered)
    print("rendered:", accuracy(rendered, captions))
    print(
        "rebuilt:",
        accuracy(rebuilt, captions),
        f"L1 {np.abs(rebuilt / 127.5 - rendered / 127.5).mean():.4f} in [-1, 1]",
    )
    scenes = all_scenes()
    prompts = [caption(scenes[i]) for i in np.random.default_rng(args.seed).integers(0, len(scenes), args.count)]
    images = generate(pipe, prompts, args.guidance, args.steps, args.seed)
    print("generated:", accuracy(images, prompts))
    missed = Counter(
        (parse(prompt).animal, seen.animal)
        for prompt, seen in zip(prompts, classify(images), strict=True)
        if parse(prompt).animal != seen.animal
    )
    print("most missed (asked, seen):", missed.most_common(8))
    save_grid(generate(pipe, GRID_PROMPTS, args.guidance, args.steps, args.seed), 8, DOCS / "emoji_world_grid.png")
    print(f"grid in {DOCS}/emoji_world_grid.png, row by row: " + ", ".join(GRID_PROMPTS))
