"""Trains a CLIP of 1.4 million parameters on pictures and captions, and an aesthetic head on its embeddings.

Nobody has rated these pictures, so the head is a stand-in: it learns a formula, the colourfulness of Hasler and
Süsstrunk (2003), as a rating.

    python -m emoji_world.pretrain_clip
"""

import argparse
import json
from pathlib import Path

import numpy as np
import open_clip
import torch
from safetensors.torch import save_file
from torch.nn import functional

from common.terminal import print_anywhere
from emoji_world.fit import fit
from emoji_world.pretrain_vae import TEST_PICTURES, to_model
from emoji_world.render import POOL, SIZE, load_pool
from emoji_world.tokenizer import MAX_LENGTH, save_tokenizer
from emoji_world.train_classifier import augment
from prompts.scenes import Scene, caption
from rewards.aesthetic import AestheticHead
from rewards.clip_model import ClipModel

WEIGHTS = Path(__file__).parent / "weights" / "clip"
HEAD = Path(__file__).parent / "weights" / "aesthetic.safetensors"
WIDTH = 128  # of the embeddings
PREPROCESSING = {
    "size": SIZE,
    "mean": [0.5] * 3,
    "std": [0.5] * 3,
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}


def make_config(vocabulary: int) -> dict:
    return {
        "embed_dim": WIDTH,
        "vision_cfg": {"image_size": SIZE, "layers": 4, "width": 128, "patch_size": 8, "head_width": 32},
        "text_cfg": {
            "context_length": MAX_LENGTH,
            "vocab_size": vocabulary,
            "hf_tokenizer_name": "in this folder",
            "width": 128,
            "heads": 4,
            "layers": 2,
        },
    }


def colourfulness(images: np.ndarray) -> np.ndarray:
    """The metric M of Hasler and Süsstrunk (2003), equation 7, of uint8 [B, H, W, 3]: float64 [B], 0 for greys."""
    red, green, blue = np.moveaxis(images.astype(np.float64), -1, 0)
    opponents = np.stack([red - green, 0.5 * (red + green) - blue])
    return np.hypot(*opponents.std((2, 3))) + 0.3 * np.hypot(*opponents.mean((2, 3)))


def rating(images: np.ndarray) -> np.ndarray:
    """What the head learns: colourfulness, in tens, so that pictures lie between 1 and 10 or so."""
    return colourfulness(images) / 10


def train_clip(steps: int, batch: int, lr: float, seed: int, folder: Path, out: Path) -> None:
    images, scenes = load_pool(folder)
    count = len(images) - TEST_PICTURES
    torch.manual_seed(seed)
    tokenizer = save_tokenizer(out)
    config = make_config(len(tokenizer))
    model = open_clip.CLIP(**config)
    contrast = open_clip.ClipLoss()

    def loss_at(_: int, rng: np.random.Generator) -> torch.Tensor:
        index = np.sort(rng.integers(0, count, batch))
        shown = [scenes[i] if rng.random() > 0.1 else Scene(scenes[i].animal, scenes[i].number, "") for i in index]
        texts = tokenizer(
            [caption(scene) for scene in shown], padding="max_length", max_length=MAX_LENGTH, return_tensors="pt"
        ).input_ids
        pictures, texts, scale = model(augment(to_model(images[index]), rng), texts)
        loss: torch.Tensor = contrast(pictures, texts, scale)
        return loss

    fit(model, loss_at, steps, lr, seed, folder / "clip.pt")
    save_file({k: v.half().contiguous() for k, v in model.state_dict().items()}, out / "open_clip_model.safetensors")
    (out / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": PREPROCESSING}, indent=1) + "\n", encoding="utf-8"
    )


def recoloured(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The same pictures with more, less or no colour: uint8 [B, H, W, 3]."""
    pixels = images.astype(np.float32)
    grey = pixels.mean(-1, keepdims=True)
    strength = rng.uniform(0, 1.5, (len(images), 1, 1, 1)).astype(np.float32)
    return (grey + strength * (pixels - grey)).clip(0, 255).round().astype(np.uint8)


def train_head(clip: Path, seed: int, folder: Path, out: Path) -> None:
    """Fits the head to 8,000 pictures, each as it is and recoloured, and prints how it does on those kept for tests."""
    images, _ = load_pool(folder)
    model = ClipModel(str(clip))
    rng = np.random.default_rng((seed, 1))

    def embedded(chosen: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        both = np.concatenate([chosen, recoloured(chosen, rng)])
        embeddings = torch.cat([model.embed_images(part) for part in np.array_split(both, len(both) // 128)])
        return embeddings.clone(), torch.from_numpy(rating(both)).float()

    embeddings, ratings = embedded(np.array(images[:8000]))
    torch.manual_seed(seed)
    head = AestheticHead(WIDTH)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=3000)
    for _ in range(3000):
        index = torch.from_numpy(rng.integers(0, len(ratings), 256))
        loss = functional.mse_loss(head(embeddings[index]), ratings[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    save_file({name: tensor.half() for name, tensor in head.state_dict().items()}, out)
    embeddings, ratings = embedded(np.array(images[-TEST_PICTURES:]))
    with torch.no_grad():
        rest = (head(embeddings) - ratings).var() / ratings.var()
    print(f"head: R² {1 - rest.item():.3f} on {len(ratings)} pictures it has not seen; ratings "
          f"{ratings.mean():.2f} ± {ratings.std():.2f}")  # fmt: skip


if __name__ == "__main__":
    print_anywhere()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=POOL, help="pictures and checkpoints")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    train_clip(args.steps, args.batch, args.lr, args.seed, args.folder, WEIGHTS)
    train_head(WEIGHTS, args.seed, args.folder, HEAD)
