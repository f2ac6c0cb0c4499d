"""Judges by its content whether an image shows the scene of its caption, with numpy and pillow only.

Example:
    >>> judgement = judge(image, simple_scene("red", "circle", background="blue"))
    >>> assert judgement.background and judgement.colour and judgement.position
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from scripts.demo_model.captions import COLOURS, POSITIONS, SHAPES, Scene, SceneObject
from scripts.demo_model.scenes import RADII, centre_of, shape_coverage

Mask = NDArray[np.bool_]

_CORNER = 0.05
# An object counts as drawn from this share of its right area on.
_MIN_AREA = 0.35
_COLOUR_NAMES = tuple(COLOURS)
_PALETTE = np.asarray(list(COLOURS.values()), np.float32)


@dataclass(frozen=True)
class Judgement:
    """What a image got right; with two objects, each must be right.

    background: the median of the corners is nearest to the background's colour.
    colour: where the caption wants an object, that object's colour prevails over the other colours.
    position: the middle of that colour is nearest to the wanted of the nine positions.
    shape: of the grammar's shapes, the wanted one overlaps best.
    """

    background: bool
    colour: bool
    position: bool
    shape: bool

    @property
    def colour_and_position(self) -> bool:
        """The figure that tests and the README stand on."""
        return self.colour and self.position

    @property
    def everything(self) -> bool:
        """Whether nothing at all is wrong."""
        return self.background and self.colour and self.position and self.shape


def judge(image: Image.Image, scene: Scene) -> Judgement:
    """Compare a image with the scene that it should show.

    Args:
        image: any size.
        scene: its caption's meaning, such as `captions.simple_scene("red", "circle", "blue")`.
    """
    pixels = np.asarray(image.convert("RGB"), np.float32)
    nearest = _nearest_colours(pixels)
    background = _corner_colour(pixels)
    found = [_judge_object(nearest, item, background, scene) for item in scene.objects]
    return Judgement(
        background=background == scene.background,
        colour=all(colour for colour, _, _ in found),
        position=all(position for _, position, _ in found),
        shape=all(shape for _, _, shape in found),
    )


def _nearest_colours(pixels: NDArray[np.float32]) -> NDArray[np.intp]:
    """(height, width) indices of the grammar's colour nearest to each pixel."""
    distances = np.square(pixels[:, :, None] - _PALETTE).sum(-1)
    return np.asarray(distances.argmin(-1), np.intp)


def _corner_colour(pixels: NDArray[np.float32]) -> str:
    height, width = pixels.shape[:2]
    rows, columns = max(1, round(height * _CORNER)), max(1, round(width * _CORNER))
    corners = [
        pixels[y, x]
        for y in (slice(rows), slice(-rows, None))
        for x in (slice(columns), slice(-columns, None))
    ]
    median = np.median(np.concatenate([corner.reshape(-1, 3) for corner in corners]), axis=0)
    return _COLOUR_NAMES[int(np.square(_PALETTE - median).sum(-1).argmin())]


def _judge_object(
    nearest: NDArray[np.intp], item: SceneObject, background: str, scene: Scene
) -> tuple[bool, bool, bool]:
    """Whether an object's colour, position and shape are right."""
    height, width = nearest.shape
    wanted = shape_coverage(item.shape, centre_of(item.position), RADII[item.size], height, width) > 0.5
    # The blend of edges may lie nearest to any third colour, so what counts is which colour is most there.
    others = {_COLOUR_NAMES.index(other.colour) for other in scene.objects if other is not item}
    ignored = others | {_COLOUR_NAMES.index(background)}
    counts = np.bincount(nearest.ravel(), minlength=len(_COLOUR_NAMES))
    counts[list(ignored - {_COLOUR_NAMES.index(item.colour)})] = 0
    index = _COLOUR_NAMES.index(item.colour)
    is_drawn = bool(counts[index] >= _MIN_AREA * wanted.sum()) and item.colour != background
    if not (is_drawn and int(counts.argmax()) == index):
        return False, False, False
    mask = nearest == index
    ys, xs = np.nonzero(mask)
    centre = (float(np.median(xs)) + 0.5) / width, (float(np.median(ys)) + 0.5) / height
    offsets = [
        (centre_of(name)[0] - centre[0]) ** 2 + (centre_of(name)[1] - centre[1]) ** 2 for name in POSITIONS
    ]
    is_placed = POSITIONS[int(np.argmin(offsets))] == item.position
    return True, is_placed, best_shape(mask) == item.shape


def best_shape(mask: Mask) -> str:
    """The grammar's shape that overlaps a mask best, whatever its size and place."""
    height, width = mask.shape
    ys, xs = np.nonzero(mask)
    bounds = [np.percentile(axis, share) for axis in (xs, ys) for share in (1, 99)]
    centre = (bounds[0] + bounds[1] + 1) / 2 / width, (bounds[2] + bounds[3] + 1) / 2 / height
    extent = max(bounds[1] - bounds[0], bounds[3] - bounds[2], 4.0) / 2 / min(height, width)
    best = ("", 0.0)
    for shape in SHAPES:
        for growth in (0.95, 1.05, 1.15, 1.25):
            for drop in (0.0, 0.1):
                place = (centre[0], centre[1] + drop * extent)
                candidate = shape_coverage(shape, place, extent * growth, height, width) > 0.5
                overlap = float((candidate & mask).sum() / max(1, (candidate | mask).sum()))
                best = max(best, (shape, overlap), key=lambda pair: pair[1])
    return best[0]
