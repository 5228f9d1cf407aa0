"""How beautiful people find a picture: LAION's aesthetic predictor on CLIP embeddings (Black et al. 2023, section 5.2).

The predictor (Schuhmann 2022, "improved aesthetic predictor") was trained on ratings from 1 to 10 of the SAC, Logos and
AVA data sets. It is five linear layers with dropout and nothing in between, so together they are one affine map.
"""

import numpy as np
import torch
from torch import nn

from common.errors import UserError
from rewards import weights
from rewards.clip_model import ClipModel

WIDTHS = (1024, 128, 64, 16, 1)
PLACES = (0, 2, 4, 6, 7)  # of the linear layers among the published model's; the others are dropout


class AestheticHead(nn.Module):
    """Embeddings float32 [B, E] of length 1 -> scores float32 [B]. State dict: layers.{0,2,4,6,7}.{weight,bias}."""

    def __init__(self, width: int = 768) -> None:
        super().__init__()
        sizes = (width, *WIDTHS)
        self.layers = nn.ModuleDict({str(place): nn.Linear(sizes[i], sizes[i + 1]) for i, place in enumerate(PLACES)})

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        x = embeddings.float()
        for layer in self.layers.values():
            x = layer(x)
        return x.squeeze(-1)


def load_head(source: str, width: int) -> AestheticHead:
    """A head for embeddings of `width` from a file, or from the hub as org/repo/file. Raises UserError."""
    state = weights.read(weights.find(source))
    head = AestheticHead(width)
    shapes = {name: list(tensor.shape) for name, tensor in head.state_dict().items()}
    found = {name: list(tensor.shape) for name, tensor in state.items()}
    if found != shapes:
        name = next(name for name in {**shapes, **found} if shapes.get(name) != found.get(name))
        raise UserError(
            f"{source} is no aesthetic head for CLIP embeddings of {width} numbers: {name} has the shape "
            f"{found.get(name, 'none')}, not {shapes.get(name, 'none')}; give the head that belongs to the CLIP model."
        )
    head.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    return head.eval().requires_grad_(False)


class Aesthetic:
    """The predicted rating.

    model, pretrained: the CLIP model, see `ClipModel`; head: the predictor's weights, a file or org/repo/file.
    """

    def __init__(
        self,
        model: str = "ViT-L-14",
        pretrained: str | None = "openai",
        head: str = "trl-lib/ddpo-aesthetic-predictor/aesthetic-model.pth",
    ) -> None:
        self.clip = ClipModel(model, pretrained)
        self.head = load_head(head, self.clip.width).to(self.clip.device)

    @torch.inference_mode()
    def __call__(self, images: np.ndarray, prompts: list[str]) -> np.ndarray:
        scores: torch.Tensor = self.head(self.clip.embed_images(images))
        return scores.cpu().numpy()
