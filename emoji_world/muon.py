"""AdamW for small parameters, Muon (orthogonalised momentum) for convolutions and matrices.

Why: with AdamW alone the autoencoder stays blurred for thousands of steps; see docs/emoji_world.md for the figures.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


def orthogonalise(matrix: torch.Tensor) -> torch.Tensor:
    """The nearest matrix with singular values of about 1, by five Newton-Schulz steps (Jordan et al., 2024)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = (x / (x.norm() + 1e-7)).bfloat16()
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    x = x.to(matrix.dtype)
    return x.T if matrix.shape[0] > matrix.shape[1] else x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised a weight at a time, scaled so that a learning rate for Adam fits (Moonlight, 2025)."""

    def __init__(self, params: Iterable[torch.Tensor], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(p)
                buffer = state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                direction = p.grad.lerp(buffer, group["momentum"])  # Nesterov
                update = orthogonalise(direction.reshape(p.shape[0], -1)).reshape(p.shape)
                p.add_(update, alpha=-group["lr"] * 0.2 * max(p.shape[0], p.numel() // p.shape[0]) ** 0.5)


def make_optimizers(model: nn.Module, lr: float, muon: bool) -> list[torch.optim.Optimizer]:
    """Muon on hidden weights, AdamW on the rest: biases, norms, embeddings, first and last layers."""
    outer = ("conv_in", "conv_out", "embedding", "quant_conv")
    inner = [p for n, p in model.named_parameters() if muon and p.ndim > 1 and not any(o in n for o in outer)]
    chosen = {id(p) for p in inner}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    adam = torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95 if muon else 0.99), weight_decay=0.0)
    return [adam, Muon(inner, lr=lr)] if inner else [adam]
