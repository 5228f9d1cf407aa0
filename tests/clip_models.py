"""Small CLIP models and aesthetic heads with random weights, as files of the published layouts."""

import json
from pathlib import Path

import open_clip
import torch
from safetensors.torch import save_file
from torch import nn

from rewards.aesthetic import PLACES, WIDTHS

WIDTH = 24  # of the embeddings
CONFIG = {
    "embed_dim": WIDTH,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "patch_size": 8, "head_width": 16},
    "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
PREPROCESSING = {
    "mean": [0.48, 0.46, 0.41],
    "std": [0.27, 0.26, 0.28],
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}


def tiny_clip(folder: Path) -> Path:
    """A folder as open_clip publishes models on the hub."""
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    model = open_clip.CLIP(**CONFIG)
    for parameter in model.parameters():  # initialised to depend little on the picture
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": CONFIG, "preprocess_cfg": PREPROCESSING}))
    return folder


def aesthetic_state(width: int = WIDTH) -> dict[str, torch.Tensor]:
    """The state dict of a predictor as LAION published it: linear layers between layers of dropout."""
    torch.manual_seed(1)
    sizes = [width, *WIDTHS]
    layers = {place: nn.Linear(a, b) for place, a, b in zip(PLACES, sizes, sizes[1:], strict=False)}
    layout = nn.Sequential(*(layers.get(place, nn.Dropout(0.1)) for place in range(max(PLACES) + 1)))
    return {f"layers.{name}": tensor for name, tensor in layout.state_dict().items()}
