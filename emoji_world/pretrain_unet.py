"""Trains the UNet and the text encoder on the autoencoder's latents, and saves the whole StableDiffusionPipeline.

Resumable: the same command goes on from the last checkpoint. Batches follow from the seed and the step alone.
`--steps` can be changed in between: the learning rate falls over the last 40 % of whatever it says.

    python -m emoji_world.pretrain_unet
"""

import argparse
import copy
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from common.terminal import print_anywhere
from emoji_world.muon import make_optimizers
from emoji_world.pretrain_vae import LATENT_CHANNELS, TEST_PICTURES, to_model
from emoji_world.render import POOL, load_pool
from emoji_world.tokenizer import MAX_LENGTH, save_tokenizer
from prompts.scenes import PLACES, Scene, caption

WEIGHTS = Path(__file__).parent / "weights" / "pipeline"
EMA = 0.999


def make_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(64, 128, 128),
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=512,
            projection_dim=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def make_scheduler() -> DDIMScheduler:
    """SD's own: with steps_offset 1 and set_alpha_to_one False the last step is a proper Gaussian, as DDPO needs."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
        timestep_spacing="leading",
    )


@torch.no_grad()
def encode_pool(vae: AutoencoderKL, images: np.ndarray) -> torch.Tensor:
    """uint8 [N, 64, 64, 3] -> posterior means, float32 [N, C, 8, 8]."""
    chunks = [images[start : start + 32] for start in range(0, len(images), 32)]  # larger ones leave the cache
    return torch.cat([vae.encode(to_model(chunk)).latent_dist.mode().contiguous() for chunk in chunks])


@torch.no_grad()
def standardise(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Folds mean 0 and std 1 a channel into the VAE's 1x1 convolutions; returns the latents it would give then.

    Why: StableDiffusionPipeline knows one scaling factor and no shift, but channels differ.
    """
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    channels = len(mean)
    vae.quant_conv.weight[:channels] /= std[:, None, None, None]
    vae.quant_conv.bias[:channels] = (vae.quant_conv.bias[:channels] - mean) / std
    vae.quant_conv.bias[channels:] -= 2 * std.log()
    vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ mean
    vae.post_quant_conv.weight *= std[None, :, None, None]
    vae.register_to_config(scaling_factor=1.0)
    return (latents - mean[:, None, None]) / std[:, None, None]


def training_caption(scene: Scene, rng: np.random.Generator) -> str:
    """The scene's caption, now and then less of it: guidance needs "", bare prompts need captions without a setting."""
    draw = rng.random()
    if draw < 0.1:
        return ""
    if draw < 0.2:
        scene = Scene(scene.animal, scene.number, "")
    text = caption(scene)
    if rng.random() < 0.1:
        words = text.split()
        text = " ".join([str(scene.number) if rng.random() < 0.5 or scene.number > 1 else "one", *words[1:]])
    return text


def save_pipeline(
    vae: nn.Module, unet: nn.Module, text_encoder: nn.Module, tokenizer: CLIPTokenizer, out: Path
) -> None:
    """Writes the pipeline in float16, readable by transformers 4 and 5."""
    pipe = StableDiffusionPipeline(
        vae=vae,
        unet=unet,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    copy.deepcopy(pipe).to(torch.float16).save_pretrained(out)
    save_tokenizer(out / "tokenizer")
    # transformers 5 leaves out "text_model."; transformers 4 would then silently start from random weights.
    path = out / "text_encoder" / "model.safetensors"
    tensors = {f"text_model.{k.removeprefix('text_model.')}": v for k, v in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    # transformers 5 would load it in half precision because of this, beside a UNet that diffusers loads in float32.
    config = out / "text_encoder" / "config.json"
    text = config.read_text(encoding="utf-8")
    config.write_text(text.replace('"dtype": "float16"', '"dtype": "float32"'), encoding="utf-8")


def restore(checkpoint: Path, model: nn.Module, average: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> int:
    """How many steps were taken before; where there is a checkpoint, all is as it was then."""
    if not checkpoint.exists():
        return 0
    saved = torch.load(checkpoint, weights_only=True)
    model.load_state_dict(saved["model"])
    average.load_state_dict(saved["average"])
    for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
        optimizer.load_state_dict(state)
    print(f"going on from step {saved['step']}", flush=True)
    step: int = saved["step"]
    return step


def train(steps: int, batch: int, lr: float, seed: int, folder: Path, out: Path) -> None:
    images, scenes = load_pool(folder)
    count = len(images) - TEST_PICTURES
    torch.manual_seed(seed)
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    encoded = folder / "latents.safetensors"
    if not encoded.exists():
        save_file({"latents": encode_pool(vae, images[:count])}, encoded)
    latents = standardise(vae, load_file(encoded)["latents"])
    tokenizer = save_tokenizer(out / "tokenizer")
    unet, text_encoder, scheduler = make_unet(), make_text_encoder(tokenizer), make_scheduler()
    model = nn.ModuleList([unet, text_encoder])
    average = copy.deepcopy(model).requires_grad_(False)
    optimizers = make_optimizers(model, lr, muon=True)
    checkpoint = folder / "unet.pt"
    step = restore(checkpoint, model, average, optimizers)
    # A single animal is large, stands in six positions and comes out last: show it more often.
    shares = np.array([4.0 if s.number == 1 and s.setting in PLACES else 1.0 for s in scenes[:count]])
    cumulative = np.cumsum(shares / shares.sum())
    started, losses = time.monotonic(), []
    while step < steps:
        rng = np.random.default_rng((seed, step))
        torch.manual_seed(seed * 1_000_003 + step)
        index = np.searchsorted(cumulative, rng.random(batch))
        clean = latents[index]
        texts = [training_caption(scenes[i], rng) for i in index]
        ids = tokenizer(texts, padding="max_length", max_length=MAX_LENGTH, return_tensors="pt").input_ids
        noise = torch.randn_like(clean)
        timesteps = torch.from_numpy(rng.integers(0, 1000, batch))
        noisy = scheduler.add_noise(clean, noise, timesteps)
        predicted = unet(noisy, timesteps, text_encoder(ids).last_hidden_state).sample
        loss = (predicted - noise).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * min(1.0, (step + 1) / 100, (steps - step) / (0.4 * steps))
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        with torch.no_grad():
            rate = 1 - min(EMA, step / (step + 10))  # short memory at first
            for slow, fast in zip(average.parameters(), model.parameters(), strict=True):
                slow.lerp_(fast, rate)
        losses.append(loss.item())
        if step % 100 == 0:
            print(f"step {step} {time.monotonic() - started:.0f} s loss {np.mean(losses[-100:]):.4f}", flush=True)
        if step % 500 == 0 or step == steps:
            states = [optimizer.state_dict() for optimizer in optimizers]
            saved = {"model": model.state_dict(), "average": average.state_dict(), "optimizers": states, "step": step}
            torch.save(saved, checkpoint)
            save_pipeline(vae, average[0], average[1], tokenizer, out)
            print(f"saved {out} at step {step}", flush=True)


if __name__ == "__main__":
    print_anywhere()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3400)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=POOL, help="pictures, the autoencoder and checkpoints")
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    args = parser.parse_args()
    torch.set_num_threads(2)
    train(args.steps, args.batch, args.lr, args.seed, args.folder, args.out)
