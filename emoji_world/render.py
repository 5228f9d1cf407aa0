"""Draws 64x64 pictures of scenes from the Noto colour emoji. Needed for pretraining and tests only, never by a run.

Everything sits on a grid of 8 pixels and in few sizes. The autoencoder has 8x8 latents, so a picture is then 64 patches
out of a finite vocabulary, which a small autoencoder can learn sharply; free positions it blurs (see docs).

    python -m emoji_world.render --count 60000     # writes the pool of pictures that all pretraining reads
"""

import argparse
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from common.terminal import print_anywhere
from prompts.scenes import ACTIVITIES, ANIMALS, PLACES, Scene, all_scenes

SIZE = 64  # pixels a side
CELL = 8  # pixels a side of what one latent sees first
FONT_PATHS = (
    Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"),
    Path("/usr/share/fonts/noto/NotoColorEmoji.ttf"),
    Path("/usr/share/fonts/google-noto-emoji/NotoColorEmoji.ttf"),
)
POOL = Path("data/emoji_world")

# One glyph an animal. Faces where there are some: they are readable at 32 pixels. There is no squirrel: a chipmunk.
GLYPHS = dict(
    zip(
        ANIMALS,
        (
            "🐱 🐶 🐴 🐵 🐰 🦓 🕷 🐦 🐑 🦌 🐮 🐐 🦁 🐯 🐻 🦝 🦊 🐺 🦎 🪲 🐜 🦋 🐟 "
            "🦈 🐳 🐬 🐿 🐭 🐀 🐍 🐢 🐸 🐔 🦆 🪿 🐝 🐷 🦃 🪰 🦙 🐪 🦇 🦍 🦔 🦘"
        ).split(),
        strict=True,
    )
)

# Left upper corners, in pixels, of each animal: arrangements by number.
ARRANGEMENTS: dict[int, tuple[tuple[tuple[int, int], ...], ...]] = {
    1: (((0, 8),), ((8, 8),), ((16, 8),), ((0, 16),), ((8, 16),), ((16, 16),)),
    2: (((0, 16), (32, 16)), ((0, 32), (32, 32)), ((0, 24), (32, 24)), ((0, 0), (32, 32)), ((32, 0), (0, 32))),
    3: (((16, 0), (0, 32), (32, 32)), ((0, 0), (32, 0), (16, 32))),
    4: (((0, 0), (32, 0), (0, 32), (32, 32)),),
}
ANIMAL_SIZE = {1: 48, 2: 32, 3: 32, 4: 32}  # pixels


@cache
def _font() -> ImageFont.FreeTypeFont:
    for path in FONT_PATHS:
        if path.exists():
            return ImageFont.truetype(str(path), 109)  # the one size this bitmap font has
    raise FileNotFoundError("no Noto colour emoji font: apt-get install fonts-noto-color-emoji")


@cache
def glyph(char: str, size: int) -> tuple[np.ndarray, np.ndarray]:
    """One emoji in a size x size box, standing on its lower edge: premultiplied RGB and alpha, float32 in [0, 1]."""
    canvas = Image.new("RGBA", (136, 128), (0, 0, 0, 0))
    ImageDraw.Draw(canvas).text((0, 0), char, font=_font(), embedded_color=True)
    box = canvas.getbbox()
    if box is None:
        raise ValueError(f"the font has no glyph for {char}")
    canvas = canvas.crop(box)
    inner = size - (2 if size > CELL else 0)  # a margin, so that neighbours do not touch
    scale = inner / max(canvas.size)
    width, height = (max(1, round(side * scale)) for side in canvas.size)
    pixels = np.asarray(canvas, np.float32) / 255
    pixels[..., :3] *= pixels[..., 3:]
    # Resizing premultiplied channels one by one keeps dark fringes away from the outline.
    small = np.stack(
        [np.asarray(Image.fromarray(pixels[..., c]).resize((width, height), Image.Resampling.BOX)) for c in range(4)],
        -1,
    )
    out = np.zeros((size, size, 4), np.float32)
    x, y = (size - width) // 2, size - height - (size - inner) // 2
    out[y : y + height, x : x + width] = small.clip(0, 1)
    return out[..., :3], out[..., 3:]


def _paste(picture: np.ndarray, char: str, size: int, x: int, y: int) -> None:
    rgb, alpha = glyph(char, size)
    view = picture[y : y + size, x : x + size]
    view *= 1 - alpha[: view.shape[0], : view.shape[1]]
    view += rgb[: view.shape[0], : view.shape[1]]


def _band(picture: np.ndarray, top: int, bottom: int, upper: str, lower: str) -> None:
    """Fills rows top..bottom with a vertical gradient between two hex colours."""
    ends = [np.array([int(c[i : i + 2], 16) for i in (0, 2, 4)], np.float32) / 255 for c in (upper, lower)]
    mix = np.linspace(0, 1, bottom - top, dtype=np.float32)[:, None, None]
    picture[top:bottom] = ends[0] * (1 - mix) + ends[1] * mix


def _sprinkle(picture: np.ndarray, rng: np.random.Generator, char: str, rows: range, density: float) -> None:
    """One 8 pixel emoji in some of the cells of these rows of cells."""
    for row in rows:
        for column in range(SIZE // CELL):
            if rng.random() < density:
                _paste(picture, char, CELL, column * CELL, row * CELL)


def _pick(rng: np.random.Generator, *choices: Any) -> Any:
    return choices[rng.integers(len(choices))]


def background(setting: str, rng: np.random.Generator) -> np.ndarray:
    """A setting without animals: float32 [64, 64, 3] in [0, 1]. Some are smooth, some busy; all vary with rng."""
    picture = np.zeros((SIZE, SIZE, 3), np.float32)
    horizon = _pick(rng, 24, 32, 40)
    corner = _pick(rng, 0, 48)
    density = _pick(rng, 0.0, 0.08, 0.25)
    if setting in PLACES:
        _draw_place(picture, setting, rng, horizon, corner, density)
    elif setting in ACTIVITIES:
        _draw_activity(picture, setting, rng)
    else:
        raise ValueError(f"no setting {setting!r}")
    return picture


def _draw_place(
    picture: np.ndarray, setting: str, rng: np.random.Generator, horizon: int, corner: int, density: float
) -> None:
    if setting == "beach":
        _band(picture, 0, horizon, *_pick(rng, ("4fb3ff", "bfe6ff"), ("ff9a5a", "ffe0a0")))
        _band(picture, horizon - 8, horizon + 8, "1f8fd0", "35b8d8")
        _band(picture, horizon + 8, SIZE, "ffe3a0", "f0c878")
        _paste(picture, "🌴", 24, _pick(rng, 0, 40), horizon - 16)
        _sprinkle(picture, rng, "🐚", range(horizon // CELL + 2, 8), density)
    elif setting == "forest":
        _band(picture, 0, horizon, "9fd8a0", "5fae68")
        _band(picture, horizon, SIZE, "4a7a34", "2f5a24")
        for x in range(0, SIZE, 16):
            if rng.random() < 0.8:
                _paste(picture, "🌲", 24 if x < SIZE - 16 else 16, x, horizon - (16 if x < SIZE - 16 else 8))
        _sprinkle(picture, rng, "🍄", range(horizon // CELL + 1, 8), density)
    elif setting == "snow":
        _band(picture, 0, horizon, *_pick(rng, ("b8cfe6", "e6f0fa"), ("8aa6c8", "cfdcec")))
        _band(picture, horizon, SIZE, "f4f9ff", "dfeaf6")
        _sprinkle(picture, rng, "❄", range(0, 8), density)
        if rng.random() < 0.5:
            _paste(picture, "⛄", 16, corner, horizon - 8)
    elif setting == "desert":
        _band(picture, 0, horizon, *_pick(rng, ("f7b267", "ffe3b0"), ("7fc4e8", "f5e6c0")))
        _band(picture, horizon, SIZE, "e8a050", "c87830")
        _paste(picture, "🌵", 24, _pick(rng, 0, 40), horizon - 16)
        if rng.random() < 0.5:
            _paste(picture, "☀", 16, corner, 0)
    elif setting == "sea":
        _band(picture, 0, SIZE, *_pick(rng, ("40b8e0", "08306b"), ("20a8a8", "064a5a")))
        _sprinkle(picture, rng, "🫧", range(0, 7), density)
        _sprinkle(picture, rng, "🌿", range(7, 8), 0.5)
    elif setting == "city":
        _band(picture, 0, SIZE, *_pick(rng, ("0c1440", "3a3a80"), ("281040", "704070")))
        _paste(picture, "🌙", 16, corner, 0)
        _skyline(picture, rng)
    elif setting == "space":
        _band(picture, 0, SIZE, *_pick(rng, ("1a1050", "3c1c70"), ("10204c", "243c78")))
        _sprinkle(picture, rng, "⭐", range(0, 8), max(density, 0.08))
        _paste(picture, "🪐", 16, corner, _pick(rng, 0, 48))
    elif setting == "meadow":
        _band(picture, 0, horizon, "6ec6ff", "d0efff")
        _band(picture, horizon, SIZE, "8fd850", "58a830")
        _paste(picture, "☁", 16, corner, 0)
        _sprinkle(picture, rng, _pick(rng, "🌼", "🌷"), range(horizon // CELL, 8), max(density, 0.08))


def _draw_activity(picture: np.ndarray, setting: str, rng: np.random.Generator) -> None:
    if setting == "dishes":
        _band(picture, 0, SIZE, "cfeee8", "cfeee8")
        picture[:, ::CELL] = picture[::CELL] = (0.62, 0.82, 0.8)  # the grid of kitchen tiles
        _band(picture, 40, SIZE, *_pick(rng, ("b07848", "8a5a34"), ("a8a8b0", "808088")))
    elif setting == "bike":
        _band(picture, 0, 40, "7ec8f4", "d8f0fc")
        _band(picture, 40, SIZE, "606468", "484c50")
        picture[52:54, np.arange(SIZE) % 16 < CELL] = (0.95, 0.9, 0.5)  # the dashes of the road
    elif setting == "chess":
        wall = _pick(rng, "a04848", "486a90")
        _band(picture, 0, 40, wall, wall)
        for row, column in np.ndindex(3, 8):
            colour = (0.93, 0.85, 0.7) if (row + column) % 2 else (0.4, 0.26, 0.16)
            picture[40 + row * CELL : 48 + row * CELL, column * CELL : (column + 1) * CELL] = colour


def _skyline(picture: np.ndarray, rng: np.random.Generator) -> None:
    """Buildings of 8 pixel cells, each with a window that is lit or dark."""
    for column in range(SIZE // CELL):
        for row in range(_pick(rng, 2, 3, 4, 5), SIZE // CELL):
            x, y = column * CELL, row * CELL
            picture[y : y + CELL, x : x + CELL] = (0.16, 0.17, 0.24)
            picture[y + 2 : y + 6, x + 2 : x + 6] = (1.0, 0.85, 0.4) if rng.random() < 0.4 else (0.08, 0.09, 0.14)


def render(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """A picture of the scene, uint8 [64, 64, 3]; arrangement and background vary with rng."""
    picture = background(scene.setting, rng)
    animal = GLYPHS[scene.animal]
    if scene.setting == "dishes":
        left = rng.random() < 0.5
        _paste(picture, animal, 32, 0 if left else 32, 16)
        _paste(picture, "🍽", 32, 32 if left else 0, 32)
    elif scene.setting == "bike":
        x = _pick(rng, 0, 8, 16, 24)
        _paste(picture, "🚲", 40, x, 16)
        _paste(picture, animal, 32, x, 0)
    elif scene.setting == "chess":
        left = rng.random() < 0.5
        _paste(picture, animal, 32, 0 if left else 32, 8)
        _paste(picture, "♟", 24, 32 if left else 8, 32)
    else:
        for x, y in _pick(rng, *ARRANGEMENTS[scene.number]):
            _paste(picture, animal, ANIMAL_SIZE[scene.number], x, y)
    return (picture.clip(0, 1) * 255 + 0.5).astype(np.uint8)


def make_pool(count: int, seed: int, folder: Path) -> None:
    """Renders `count` pictures: images.npy, uint8 [count, 64, 64, 3], and scenes.json, the scene of each."""
    rng = np.random.default_rng(seed)
    scenes = all_scenes()
    # Activities are 135 of 1,575 scenes and hard; singles carry the detail of an animal. Both come more often.
    weights = np.array(
        [3.0 if s.setting in ("dishes", "bike", "chess") else 2.0 if s.number == 1 else 1.0 for s in scenes]
    )
    chosen = rng.choice(len(scenes), count, p=weights / weights.sum())
    folder.mkdir(parents=True, exist_ok=True)
    images = np.lib.format.open_memmap(folder / "images.npy", "w+", np.uint8, (count, SIZE, SIZE, 3))
    for i, index in enumerate(chosen):
        images[i] = render(scenes[index], rng)
    images.flush()
    rows = [[s.animal, s.number, s.setting] for s in (scenes[i] for i in chosen)]
    (folder / "scenes.json").write_text(json.dumps(rows), encoding="utf-8")


def load_pool(folder: Path) -> tuple[np.ndarray, list[Scene]]:
    """The pool that make_pool wrote: a memory map uint8 [N, 64, 64, 3] and N scenes."""
    if not (folder / "scenes.json").exists():
        raise FileNotFoundError(f"no pictures in {folder}: run python -m emoji_world.render first")
    return np.load(folder / "images.npy", mmap_mode="r"), [
        Scene(*r) for r in json.loads((folder / "scenes.json").read_text(encoding="utf-8"))
    ]


if __name__ == "__main__":
    print_anywhere()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=60_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=POOL)
    args = parser.parse_args()
    make_pool(args.count, args.seed, args.folder)
    print(f"rendered {args.count} pictures to {args.folder}")
