"""Into how many slices the decoder divides its work."""

from __future__ import annotations

MIN_SLICE_PIXELS = 2**15
"""Least size of a slice: each costs the launch and the synchronisation of an accelerator."""

MAX_BANDS = 16
"""Most bands of rows in one convolution."""


def num_bands(num_pixels: int, limit: int = MAX_BANDS) -> int:
    """Number of slices of a layer whose output has so many pixels."""
    return max(1, min(limit, num_pixels // MIN_SLICE_PIXELS))
