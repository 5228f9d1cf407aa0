"""The judge: names animal, number and setting of a picture. Trained on rendered ones alone; no reward uses it."""

from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from prompts.scenes import ANIMALS, NUMBER_WORDS, SETTINGS, Scene, parse

WEIGHTS = Path(__file__).parent / "weights" / "classifier.safetensors"
SETTING_NAMES = tuple(SETTINGS)


@dataclass(frozen=True)
class Accuracy:
    """Shares of pictures judged right, in [0, 1]. What a prompt leaves open is not asked for."""

    animal: float
    number: float
    setting: float
    all_three: float

    def __str__(self) -> str:
        parts = {"animal": self.animal, "number": self.number, "setting": self.setting, "all three": self.all_three}
        return ", ".join(f"{name} {share:.3f}" for name, share in parts.items())


class SceneClassifier(nn.Module):
    """float32 [B, 3, 64, 64] in [-1, 1] -> logits of animal [B, 45], number [B, 4] and setting [B, 11]."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 32, 64, 128, 192)
        self.features = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv2d(a, b, 3, stride=2, padding=1), nn.GroupNorm(8, b), nn.SiLU(),
                    nn.Conv2d(b, b, 3, padding=1), nn.GroupNorm(8, b), nn.SiLU(),
                )
                for a, b in pairwise(widths)
            )
        )  # fmt: skip
        pooled = 2 * widths[-1]
        self.animal = nn.Linear(pooled, len(ANIMALS))
        self.number = nn.Linear(pooled, len(NUMBER_WORDS))
        self.setting = nn.Linear(pooled, len(SETTING_NAMES))

    def forward(self, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x = self.features(pictures)
        x = torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1)
        return self.animal(x), self.number(x), self.setting(x)


@cache
def load_classifier() -> SceneClassifier:
    model = SceneClassifier()
    model.load_state_dict({k: v.float() for k, v in load_file(WEIGHTS).items()})
    return model.eval()


@torch.no_grad()
def classify(images: np.ndarray) -> list[Scene]:
    """uint8 [B, 64, 64, 3] -> the most likely scene of each picture."""
    pixels = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
    chunks = [load_classifier()(chunk) for chunk in pixels.split(256)]
    animal, number, setting = (torch.cat(logits).argmax(1).tolist() for logits in zip(*chunks, strict=True))
    return [Scene(ANIMALS[a], n + 1, SETTING_NAMES[s]) for a, n, s in zip(animal, number, setting, strict=True)]


def right(images: np.ndarray, prompts: list[str]) -> dict[str, np.ndarray]:
    """bool [B] by "animal", "number" and "setting": whether uint8 pictures [B, 64, 64, 3] show what their prompts
    say."""
    pairs = list(zip(classify(images), map(parse, prompts), strict=True))
    return {
        "animal": np.array([seen.animal == asked.animal for seen, asked in pairs]),
        "number": np.array([seen.number == asked.number for seen, asked in pairs]),
        "setting": np.array([asked.setting in ("", seen.setting) for seen, asked in pairs]),
    }


def accuracy(images: np.ndarray, prompts: list[str]) -> Accuracy:
    """How often they are right, each by itself and all three at once."""
    hits = right(images, prompts)
    return Accuracy(*(float(hit.mean()) for hit in (*hits.values(), np.logical_and.reduce([*hits.values()]))))
