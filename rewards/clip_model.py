"""An open_clip model with its own preprocessing, batched: what the aesthetic and the CLIP rewards share."""

from pathlib import Path

import numpy as np
import open_clip
import torch
from torch.nn import functional
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from common.blame import for_the_user_to_mend
from common.errors import UserError

SCHEMAS = ("hf-hub:", "local-dir:")  # of open_clip's own names; they bring their weights along


class ClipModel:
    """Unit-length embeddings of pictures and texts.

    model: a name that open_clip knows ("ViT-L-14"), "hf-hub:org/repo", "local-dir:folder", or a folder; pretrained:
    the tag or file of the weights, where model is a name; otherwise they come with it. Runs on a GPU if the actor has
    one, in float32. Raises UserError.
    """

    def __init__(self, model: str, pretrained: str | None = None) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        source = f"local-dir:{model}" if Path(model).is_dir() else model
        has_weights = source.startswith(SCHEMAS)
        _check_name(source, pretrained, has_weights)
        fix = (
            "give a folder with open_clip_config.json and weights, a hub id as hf-hub:org/repo, or a name and tag that "
            "open_clip knows"
        )
        with for_the_user_to_mend(f"The CLIP model {model} (pretrained={pretrained}) cannot be loaded", fix):
            self.model = open_clip.create_model(
                source,
                None if has_weights else pretrained,
                device=self.device,
                force_quick_gelu=pretrained == "openai" and not has_weights,  # which OpenAI's weights were trained with
                require_pretrained=True,
            ).eval()
            self.tokenizer = open_clip.get_tokenizer(source)
        self.preprocessing = open_clip.get_model_preprocess_cfg(self.model)

    @property
    def width(self) -> int:
        """E, the size of an embedding."""
        return int(self.embed_texts(["a"]).shape[1])

    @torch.inference_mode()
    def embed_images(self, images: np.ndarray) -> torch.Tensor:
        """float32 [B, E] of uint8 [B, H, W, 3], each of length 1."""
        return functional.normalize(self.model.encode_image(self.preprocess(images)).float(), dim=-1)

    @torch.inference_mode()
    def embed_texts(self, texts: list[str]) -> torch.Tensor:
        """float32 [B, E], each of length 1. What is beyond the model's context length is cut off."""
        return functional.normalize(self.model.encode_text(self.tokenizer(texts).to(self.device)).float(), dim=-1)

    def preprocess(self, images: np.ndarray) -> torch.Tensor:
        """float32 [B, 3, h, w] as open_clip prepares pictures for inference: resized with the shorter side to the
        model's size, cut in the middle, normalised."""
        settings = self.preprocessing
        pixels: torch.Tensor = torch.tensor(images, device=self.device).permute(0, 3, 1, 2)
        height, width = (settings["size"],) * 2 if isinstance(settings["size"], int) else settings["size"]
        size = [height, width] if settings["resize_mode"] == "squash" else [min(height, width)]
        mode = InterpolationMode.BILINEAR if settings["interpolation"] == "bilinear" else InterpolationMode.BICUBIC
        pixels = transforms.resize(pixels, size, interpolation=mode, antialias=True)
        pixels = transforms.center_crop(pixels, [height, width])
        pixels = transforms.to_dtype(pixels, torch.float32, scale=True)
        pixels = transforms.normalize(pixels, list(settings["mean"]), list(settings["std"]))
        return pixels


def _check_name(source: str, pretrained: str | None, has_weights: bool) -> None:
    if has_weights:
        return
    if source not in open_clip.list_models():
        raise UserError(
            f"The CLIP model {source} is no folder and no name that open_clip knows (ViT-L-14, ViT-H-14, ...); give "
            "one of those, a folder, or hf-hub:org/repo."
        )
    tags = open_clip.list_pretrained_tags_by_model(source)
    if pretrained not in tags and not (pretrained and Path(pretrained).is_file()):
        raise UserError(
            f"The CLIP model {source} has no weights pretrained={pretrained}; give a file, or one of {', '.join(tags)}."
        )
