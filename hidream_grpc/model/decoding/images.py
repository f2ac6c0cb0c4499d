"""Encodes pixels into the bytes of an image file."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hidream_grpc.model.parameters import OutputFormat

MIN_FULL_COLOUR_QUALITY = 95
"""Quality of a JPEG from which on colour has as many pixels as brightness, for clean edges."""


def encode_image(pixels: NDArray[np.uint8], output_format: OutputFormat, quality: int) -> bytes:
    """Encode one image; the same pixels always give the same bytes.

    Args:
        pixels: (height, width, 3), RGB.
        output_format: format of the file.
        quality: quality of JPEG and WebP, 1 to 100; PNG is lossless and ignores it.

    Raises:
        ValueError: the pixels are not RGB of 8 bits a channel.
    """
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"pixels must be uint8 (height, width, 3), not {pixels.dtype} {pixels.shape}")
    file = io.BytesIO()
    image = Image.fromarray(pixels)
    match output_format:
        case OutputFormat.PNG:
            image.save(file, format=output_format.value)
        case OutputFormat.JPEG:
            sampling = "4:4:4" if quality >= MIN_FULL_COLOUR_QUALITY else "4:2:0"
            image.save(file, format=output_format.value, quality=quality, subsampling=sampling)
        case OutputFormat.WEBP:
            image.save(file, format=output_format.value, quality=quality)
    return file.getvalue()
