"""Draws scenes: a signed-distance rasteriser with soft edges (numpy only).

Coordinates are fractions of the image's width and height; lengths are fractions of its shorter
side, so that shapes keep their form in images that are not square.
"""

import random
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from scripts.demo_model.captions import COLOURS, POSITIONS, Scene, SceneObject

Array = NDArray[np.float32]

RADII = {"small": 0.14, "medium": 0.2, "big": 0.25}
_GRID = (0.26, 0.5, 0.74)
# Small, so that the image at the first denoising step is nearly decided by the caption alone,
# but enough for two seeds to give two images.
_JITTER_OFFSET = 0.015
_JITTER_RADIUS = 0.05


def centre_of(position: str) -> tuple[float, float]:
    """The (x, y) of a position's name, as fractions of width and height."""
    cell = POSITIONS.index(position)
    return _GRID[cell % 3], _GRID[cell // 3]


def _circle(x: Array, y: Array) -> Array:
    return np.asarray(0.95 - np.hypot(x, y), np.float32)


def _square(x: Array, y: Array) -> Array:
    return np.asarray(0.85 - np.maximum(np.abs(x), np.abs(y)), np.float32)


def _triangle(x: Array, y: Array) -> Array:
    side = 0.5 * (y + 1.0) * 0.9 - np.abs(x) * 0.9
    return np.asarray(np.minimum(side, 0.8 - y), np.float32)


def _star(x: Array, y: Array) -> Array:
    angle = np.arctan2(x, -y)
    sector = np.abs((angle + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)
    radius = np.hypot(x, y)
    tip_x, inner_x, inner_y = 1.1, 0.48 * np.cos(np.pi / 5), 0.48 * np.sin(np.pi / 5)
    along, across = radius * np.cos(sector), radius * np.sin(sector)
    edge_x, edge_y = inner_x - tip_x, inner_y
    length = np.hypot(edge_x, edge_y)
    return np.asarray(((along - tip_x) * edge_y - across * edge_x) / length * -1.0, np.float32)


def _cross(x: Array, y: Array) -> Array:
    x, y = np.abs(x), np.abs(y)
    upright = np.minimum(0.32 - x, 1.0 - y)
    level = np.minimum(1.0 - x, 0.32 - y)
    return np.asarray(np.maximum(upright, level), np.float32)


def _ring(x: Array, y: Array) -> Array:
    return np.asarray(0.22 - np.abs(np.hypot(x, y) - 0.78), np.float32)


_DISTANCES: dict[str, Callable[[Array, Array], Array]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "ring": _ring,
}


def shape_coverage(shape: str, centre: tuple[float, float], radius: float, height: int, width: int) -> Array:
    """How much of each pixel a shape covers.

    Args:
        shape: a word of `captions.SHAPES`.
        centre: (x, y), fractions of width and height.
        radius: fraction of the shorter side.
        height: pixels.
        width: pixels.

    Returns:
        (height, width), 0 to 1.
    """
    radius_pixels = radius * min(height, width)
    x = (np.arange(width, dtype=np.float32)[None, :] + 0.5 - centre[0] * width) / radius_pixels
    y = (np.arange(height, dtype=np.float32)[:, None] + 0.5 - centre[1] * height) / radius_pixels
    inside = _DISTANCES[shape](*np.broadcast_arrays(x, y))
    return np.asarray(np.clip(inside * radius_pixels + 0.5, 0.0, 1.0), np.float32)


def draw(
    scene: Scene,
    height: int,
    width: int,
    rng: random.Random | None = None,
    palette: dict[str, tuple[int, int, int]] | None = None,
) -> Array:
    """Draw a scene.

    Args:
        scene: what to draw.
        height: pixels.
        width: pixels.
        rng: moves and scales every object a little; None draws the scene exactly.
        palette: colours in place of the grammar's.

    Returns:
        (3, height, width), -1 to 1.
    """
    colours = palette or COLOURS
    image = np.empty((3, height, width), np.float32)
    image[:] = np.asarray(colours[scene.background], np.float32)[:, None, None]
    for item in scene.objects:
        centre, radius = _placement(item, rng)
        coverage = shape_coverage(item.shape, centre, radius, height, width)
        colour = np.asarray(colours[item.colour], np.float32)[:, None, None]
        image += (colour - image) * coverage
    return image / 127.5 - 1.0


def _placement(item: SceneObject, rng: random.Random | None) -> tuple[tuple[float, float], float]:
    x, y = centre_of(item.position)
    radius = RADII[item.size]
    if rng is not None:
        x += rng.uniform(-_JITTER_OFFSET, _JITTER_OFFSET)
        y += rng.uniform(-_JITTER_OFFSET, _JITTER_OFFSET)
        radius *= 1 + rng.uniform(-_JITTER_RADIUS, _JITTER_RADIUS)
    return (x, y), radius
