"""The JPEG rewards of Black et al. 2023, section 5.1: how well a picture compresses, which no prompt can ask for."""

import io

import numpy as np
from PIL import Image

QUALITY = 95


def jpeg_kilobytes(images: np.ndarray) -> np.ndarray:
    """Size of each picture as a JPEG file, in 1000 bytes: float32 [B] of uint8 [B, H, W, 3].

    Quality 95 with Pillow's default chroma subsampling, as in the paper's public code.
    """
    return np.array([_file_size(image) / 1000 for image in images], np.float32)


def _file_size(image: np.ndarray) -> int:
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="JPEG", quality=QUALITY)
    return file.tell()


class JpegCompressibility:
    """Minus the size in kB: smooth pictures win."""

    def __call__(self, images: np.ndarray, prompts: list[str]) -> np.ndarray:
        return -jpeg_kilobytes(images)


class JpegIncompressibility:
    """The size in kB: busy pictures win."""

    def __call__(self, images: np.ndarray, prompts: list[str]) -> np.ndarray:
        return jpeg_kilobytes(images)
