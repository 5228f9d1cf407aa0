"""How well a picture fits its prompt: the cosine of their CLIP embeddings (Hessel et al. 2021, CLIPScore, unscaled)."""

import numpy as np

from rewards.base import Scores
from rewards.clip_model import ClipModel


class ClipScore:
    """cos(picture, prompt), in [-1, 1]. The original's 2.5 and its cut at 0 would change no advantage.

    model, pretrained: see `ClipModel`. embeddings: store each picture's in a column, `embedding`, from which an
    evaluation's diversity is computed.
    """

    def __init__(self, model: str = "ViT-L-14", pretrained: str | None = "openai", embeddings: bool = False) -> None:
        self.clip = ClipModel(model, pretrained)
        self.embeddings = embeddings

    def __call__(self, images: np.ndarray, prompts: list[str]) -> Scores:
        seen = self.clip.embed_images(images)
        scores = (seen * self.clip.embed_texts(prompts)).sum(dim=-1).cpu().numpy()
        return Scores(scores, {"embedding": seen.cpu().numpy()} if self.embeddings else {})
