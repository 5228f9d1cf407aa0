"""Trains the autoencoder: an AutoencoderKL from 64x64 pictures to 8x8 latents, on the pool of emoji_world.render.

Resumable: the same command goes on from the last checkpoint. Batches follow from the seed and the step alone.

    python -m emoji_world.pretrain_vae
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from common.terminal import print_anywhere
from emoji_world.muon import make_optimizers
from emoji_world.render import POOL, load_pool

LATENT_CHANNELS = 12
TEST_PICTURES = 512  # the last of the pool are never trained on
KL_WEIGHT = 1e-4


def make_vae() -> AutoencoderKL:
    """4.4 M parameters, few at full resolution, where they are slow, and many at 8x8, where they remember glyphs."""
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=(16, 32, 96, 160),
        latent_channels=LATENT_CHANNELS,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=64,
    )


def to_model(pictures: np.ndarray) -> torch.Tensor:
    """uint8 [B, 64, 64, 3] -> float32 [B, 3, 64, 64] in [-1, 1]."""
    pixels = torch.from_numpy(np.array(pictures)).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)
    return pixels.contiguous(memory_format=torch.channels_last)


def pca_floor(pictures: np.ndarray, test: np.ndarray, components: int) -> float:
    """Mean absolute error, in [-1, 1], of 8x8 patches of `test` rebuilt from their first principal components."""

    def patches(images: np.ndarray) -> torch.Tensor:
        return torch.nn.functional.pixel_unshuffle(to_model(images), 8).permute(0, 2, 3, 1).reshape(-1, 192)

    train = patches(pictures)
    mean = train.mean(0)
    basis = torch.linalg.eigh((train - mean).T @ (train - mean)).eigenvectors[:, -components:]
    centred = patches(test) - mean
    return (centred - centred @ basis @ basis.T).abs().mean().item()


@torch.no_grad()
def reconstruction_error(vae: AutoencoderKL, test: np.ndarray) -> float:
    """Mean absolute error in [-1, 1] of decoded posterior means."""
    errors = []
    for start in range(0, len(test), 64):
        x = to_model(test[start : start + 64])
        errors.append((vae.decode(vae.encode(x).latent_dist.mode()).sample - x).abs().mean().item())
    return float(np.mean(errors))


def train(steps: int, batch: int, lr: float, seed: int, folder: Path, out: Path) -> None:
    images, _ = load_pool(folder)
    count = len(images) - TEST_PICTURES
    test = np.array(images[count:])
    torch.manual_seed(seed)
    vae = make_vae().to(memory_format=torch.channels_last)
    optimizers = make_optimizers(vae, lr, muon=True)
    step, checkpoint = 0, folder / "vae.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        vae.load_state_dict(saved["vae"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        step = saved["step"]
        print(f"going on from step {step}", flush=True)
    print(
        f"PCA of 8x8 patches, {LATENT_CHANNELS} components: {pca_floor(images[:4096], test, LATENT_CHANNELS):.4f}",
        flush=True,
    )
    started, losses = time.monotonic(), []
    while step < steps:
        torch.manual_seed(seed * 1_000_003 + step)  # posterior samples
        rng = np.random.default_rng((seed, step))
        x = to_model(images[np.sort(rng.integers(0, count, batch))])
        with torch.autocast("cpu", torch.bfloat16, enabled=torch.cpu._is_avx512_bf16_supported()):
            posterior = vae.encode(x).latent_dist
            rebuilt = vae.decode(posterior.sample()).sample.float()
        l1 = (rebuilt - x).abs().mean()
        (l1 + KL_WEIGHT * posterior.kl().mean() / posterior.mean[0].numel()).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                # Constant, then down to 0 over the last 40 %: the end can be moved while it runs.
                group["lr"] = lr * min(1.0, (step + 1) / 50, (steps - step) / (0.4 * steps))
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        losses.append(l1.item())
        if step % 50 == 0:
            print(f"step {step} {time.monotonic() - started:.0f} s l1 {np.mean(losses[-50:]):.4f}", flush=True)
        if step % 500 == 0 or step == steps:
            print(f"step {step} test l1 {reconstruction_error(vae, test):.4f}", flush=True)
            states = [o.state_dict() for o in optimizers]
            torch.save({"vae": vae.state_dict(), "optimizers": states, "step": step}, checkpoint)
    vae.save_pretrained(out)
    print(f"saved {out}")


if __name__ == "__main__":
    print_anywhere()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4500)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=POOL, help="pictures and checkpoints")
    args = parser.parse_args()
    torch.set_num_threads(2)
    train(args.steps, args.batch, args.lr, args.seed, args.folder, args.folder / "vae")
