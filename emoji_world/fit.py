"""The training loop of the small eyes: captioner, CLIP and text model."""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from emoji_world.muon import make_optimizers

SAVE_EVERY = 500


def fit(
    model: nn.Module,
    loss_at: Callable[[int, np.random.Generator], torch.Tensor],
    steps: int,
    lr: float,
    seed: int,
    checkpoint: Path,
) -> None:
    """Trains for `steps` steps, from `checkpoint` if it is there, so that the same command goes on.

    loss_at(step, rng) computes the loss of a fresh batch, which follows from the seed and the step alone. The
    learning rate rises over 100 steps and falls over the second half.
    """
    optimizers = make_optimizers(model, lr, muon=True)
    step = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        step = saved["step"]
        print(f"going on from step {step}", flush=True)
    model.train()
    started, losses = time.monotonic(), []
    while step < steps:
        torch.manual_seed(seed * 1_000_003 + step)
        loss = loss_at(step, np.random.default_rng((seed, step)))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * min(1.0, (step + 1) / 100, (steps - step) / (0.5 * steps))
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        losses.append(loss.item())
        if step % 100 == 0:
            print(f"step {step} {time.monotonic() - started:.0f} s loss {np.mean(losses[-100:]):.4f}", flush=True)
        if step % SAVE_EVERY == 0 or step == steps:
            states = [optimizer.state_dict() for optimizer in optimizers]
            torch.save({"model": model.state_dict(), "optimizers": states, "step": step}, checkpoint)
    model.eval()
