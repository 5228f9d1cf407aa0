"""Grids of pictures, as one PIL image or PNG file."""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image, ImageDraw, ImageFont

from common.files import write_atomically

GAP = 6  # pixels between pictures
SMALLEST_CELL = 128  # smaller pictures are enlarged to at least this width, so that captions fit under them
CAPTION_SIZE = 12
CAPTION_LINES = 2  # of each paragraph
PAPER, INK = (255, 255, 255), (70, 70, 78)
MISSING = 205  # the grey of a cell without a picture


def grid(images: np.ndarray, captions: Sequence[str] | None = None, columns: int | None = None) -> Image.Image:
    """One RGB image of n pictures, row by row, with a caption under each: paragraphs of at most two lines.

    images: uint8 [n, H, W, 3], n >= 1. Small pictures are enlarged by a whole factor. Raises ValueError for other
    arrays, and when there are not as many captions as pictures.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or not len(images):
        raise ValueError(f"a grid is made of uint8 pictures [n, H, W, 3], got {images.dtype} {list(images.shape)}")
    if captions is not None and len(captions) != len(images):
        raise ValueError(f"{len(images)} pictures have {len(captions)} captions")
    columns = min(len(images), columns or math.ceil(math.sqrt(len(images))))
    rows = math.ceil(len(images) / columns)
    factor = max(1, math.ceil(SMALLEST_CELL / images.shape[2]))
    height, width = images.shape[1] * factor, images.shape[2] * factor
    font = ImageFont.load_default(CAPTION_SIZE)
    paragraphs = max((caption.count("\n") + 1 for caption in captions), default=1) if captions is not None else 0
    caption_height = paragraphs * CAPTION_LINES * (CAPTION_SIZE + 3) + 4 if paragraphs else 0
    canvas = Image.new("RGB", size_of(rows, columns, width, height + caption_height), PAPER)
    draw = ImageDraw.Draw(canvas)
    for index, pixels in enumerate(images):
        row, column = divmod(index, columns)
        left, top = GAP + column * (width + GAP), GAP + row * (height + caption_height + GAP)
        picture = Image.fromarray(pixels)
        canvas.paste(picture.resize((width, height), Image.Resampling.BICUBIC) if factor > 1 else picture, (left, top))
        if captions is not None:
            lines = [line for paragraph in captions[index].split("\n") for line in wrap(paragraph, width, font)]
            draw.multiline_text((left, top + height + 3), "\n".join(lines), fill=INK, font=font, spacing=3)
    return canvas


def cells(
    rows: pa.Table, pictures: Mapping[int, np.ndarray], rewards: Sequence[str]
) -> tuple[np.ndarray, list[str]] | None:
    """A picture, uint8 [n, H, W, 3], and a caption for each of n rows of an evaluation; None if there is no picture.

    pictures: uint8 [H, W, 3] by trajectory id. A row without one has a grey cell, so that every cell is the same pair
    of prompt and seed in the grids of all versions.
    """
    grey = [np.full_like(picture, MISSING) for picture in list(pictures.values())[:1]]
    if not grey:
        return None
    images = [pictures.get(trajectory_id, grey[0]) for trajectory_id in rows["trajectory_id"].to_pylist()]
    return np.stack(images), captions_of(rows, rewards)


def captions_of(rows: pa.Table, rewards: Sequence[str]) -> list[str]:
    """What stands under each picture: its prompt and, below, what rewards said of it, if they store a text, or why it
    was set aside."""
    said = [
        rows[field.name].to_pylist()
        for field in rows.schema
        if "." in field.name and field.name.split(".")[0] in rewards and pa.types.is_string(field.type)
    ]
    texts = [", ".join(text for text in texts if text) for texts in zip(*said, strict=True)] or [""] * len(rows)
    below = [f"\n“{text}”" if text else "" for text in texts]
    if "set_aside" in rows.column_names:
        aside = rows["set_aside"].to_pylist()
        below = [f"\nset aside: {why}" if why else text for why, text in zip(aside, below, strict=True)]
    return [f"{prompt}{text}" for prompt, text in zip(rows["prompt"].to_pylist(), below, strict=True)]


def size_of(rows: int, columns: int, cell_width: int, cell_height: int) -> tuple[int, int]:
    """(width, height) of a grid in pixels, with a gap round every cell."""
    return GAP + columns * (cell_width + GAP), GAP + rows * (cell_height + GAP)


def save_grid(path: Path, images: np.ndarray, captions: Sequence[str] | None = None) -> None:
    """Writes `grid` as PNG; the file is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = io.BytesIO()
    grid(images, captions).save(drawn, format="PNG", optimize=True)
    write_atomically(path, drawn.getvalue())


def wrap(text: str, width: int, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> list[str]:
    """The text in at most CAPTION_LINES lines of `width` pixels; what does not fit ends in an ellipsis."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    shown = lines[:CAPTION_LINES]
    if len(lines) > CAPTION_LINES:
        shown[-1] += "…"
    return [shorten(line, width, font) for line in shown]


def shorten(line: str, width: int, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> str:
    while font.getlength(line) > width and len(line) > 1:
        line = line.rstrip("…")[:-1] + "…"
    return line
