"""Which image sizes a checkpoint can generate."""

from __future__ import annotations

import math
from dataclasses import dataclass

MIN_SIDE_PIXELS = 64
MIN_PREVIEW_SIDE_PIXELS = 64
MAX_PREVIEW_SIDE_PIXELS = 128


@dataclass(frozen=True, slots=True)
class ImageSize:
    """Width and height of an image, in pixels."""

    width: int
    height: int


# Source: the official repository's inference script.
TRAINED_SIZES = (
    ImageSize(1024, 1024),
    ImageSize(768, 1360),
    ImageSize(1360, 768),
    ImageSize(880, 1168),
    ImageSize(1168, 880),
    ImageSize(1248, 832),
    ImageSize(832, 1248),
)
# Source: the server that this one replaces, which also offered these.
SUPPORTED_SIZES = (ImageSize(1024, 768), ImageSize(768, 1024), ImageSize(512, 512))


@dataclass(frozen=True, slots=True)
class SizeLimits:
    """The limits for width and height of an image.

    Attributes:
        size_multiple: width and height are multiples of this, in pixels (the side of a transformer token).
        max_pixels: largest width × height (the transformer's tokens).
        min_side_pixels: smallest width and height.
    """

    size_multiple: int
    max_pixels: int
    min_side_pixels: int = MIN_SIDE_PIXELS

    def allows(self, size: ImageSize) -> bool:
        """Whether an image of exactly this size can be generated."""
        return (
            min(size.width, size.height) >= self.min_side_pixels
            and size.width % self.size_multiple == 0
            and size.height % self.size_multiple == 0
            and size.width * size.height <= self.max_pixels
        )

    def largest_square(self) -> ImageSize:
        """The largest square that can be generated."""
        side = math.isqrt(self.max_pixels) // self.size_multiple * self.size_multiple
        return ImageSize(side, side)

    def recommended(self) -> tuple[ImageSize, ...]:
        """Sizes to offer first: those that HiDream-I1 was trained for, or the largest square."""
        return tuple(filter(self.allows, TRAINED_SIZES)) or (self.largest_square(),)

    def supported(self) -> tuple[ImageSize, ...]:
        """Further sizes to offer: HiDream-I1 can generate them, but was not trained for them."""
        return tuple(filter(self.allows, SUPPORTED_SIZES))
