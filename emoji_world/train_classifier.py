"""Trains the judge of emoji_world.classifier on freshly rendered pictures, never on generated ones.

Pictures are blurred, shifted and tinted at random, as a small decoder blurs, so that it judges the content.

    python -m emoji_world.train_classifier
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch.nn import functional

from common.terminal import print_anywhere
from emoji_world.classifier import SETTING_NAMES, WEIGHTS, SceneClassifier, accuracy
from emoji_world.pretrain_vae import to_model
from emoji_world.render import POOL, load_pool, render
from prompts.scenes import ANIMALS, all_scenes, caption


def augment(x: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """[B, 3, 64, 64] in [-1, 1]: blur, noise, contrast and a shift of up to 2 pixels; one blur and shift a batch."""
    if rng.random() < 0.6:
        small = functional.interpolate(x, size=int(rng.integers(24, 56)), mode="bilinear", antialias=True)
        x = functional.interpolate(small, size=64, mode="bilinear")
    x = x.roll((int(rng.integers(-2, 3)), int(rng.integers(-2, 3))), (2, 3))
    x = x * (0.8 + 0.4 * torch.rand(len(x), 1, 1, 1)) + 0.3 * (torch.rand(len(x), 3, 1, 1) - 0.5)
    return x + 0.1 * torch.rand(len(x), 1, 1, 1) * torch.randn_like(x)


def train(steps: int, batch: int, lr: float, seed: int, folder: Path, out: Path) -> None:
    images, scenes = load_pool(folder)
    targets = torch.tensor([[ANIMALS.index(s.animal), s.number - 1, SETTING_NAMES.index(s.setting)] for s in scenes])
    torch.manual_seed(seed)
    model = SceneClassifier().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    rng = np.random.default_rng(seed)
    started = time.monotonic()
    for step in range(1, steps + 1):
        index = np.sort(rng.integers(0, len(images), batch))
        logits = model(augment(to_model(images[index]), rng))
        losses = [functional.cross_entropy(guess, truth) for guess, truth in zip(logits, targets[index].T, strict=True)]
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            parts = " ".join(f"{loss.item():.3f}" for loss in losses)
            print(f"step {step} {time.monotonic() - started:.0f} s losses {parts}", flush=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.half().contiguous() for k, v in model.state_dict().items()}, out)


def unseen(count: int, seed: int) -> tuple[np.ndarray, list[str]]:
    """Rendered pictures of random scenes, from a seed no training uses, and their captions."""
    rng = np.random.default_rng((seed, 999))
    everything = all_scenes()
    chosen = [everything[i] for i in rng.integers(0, len(everything), count)]
    return np.stack([render(scene, rng) for scene in chosen]), [caption(scene) for scene in chosen]


if __name__ == "__main__":
    print_anywhere()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=POOL)
    args = parser.parse_args()
    torch.set_num_threads(2)
    train(args.steps, args.batch, args.lr, args.seed, args.folder, WEIGHTS)
    print("on 2,000 rendered pictures it has not seen:", accuracy(*unseen(2000, args.seed)))
