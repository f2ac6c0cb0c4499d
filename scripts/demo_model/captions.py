"""The demo model's grammar: what its captions can say, in English and Chinese.

A `Scene` is the meaning of a caption: a background colour and one or two objects. `sample_scene`
draws a scene, `caption_of` one of the many ways to say it. What a caption leaves out has one fixed
meaning (white background, centre, medium size), so that every caption describes exactly one scene.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (222, 32, 40),
    "orange": (255, 140, 0),
    "yellow": (255, 228, 40),
    "green": (24, 158, 64),
    "blue": (28, 72, 220),
    "purple": (142, 48, 184),
    "black": (16, 16, 16),
    "white": (244, 244, 244),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SIZES = ("small", "medium", "big")
POSITIONS = (
    "top left",
    "top",
    "top right",
    "left",
    "centre",
    "right",
    "bottom left",
    "bottom",
    "bottom right",
)
DEFAULT_BACKGROUND = "white"
DEFAULT_POSITION = "centre"
DEFAULT_SIZE = "medium"

_CHINESE_COLOURS = {
    "red": "红",
    "orange": "橙",
    "yellow": "黄",
    "green": "绿",
    "blue": "蓝",
    "purple": "紫",
    "black": "黑",
    "white": "白",
}
_CHINESE_SHAPES = {
    "circle": ("圆形", "圆", "圆圈"),
    "square": ("正方形", "方形", "方块"),
    "triangle": ("三角形",),
    "star": ("星星", "五角星", "星形"),
    "cross": ("十字", "十字形"),
    "ring": ("圆环", "环形"),
}
_CHINESE_POSITIONS = {
    "top left": ("左上角", "左上方"),
    "top": ("上方", "上面", "顶部"),
    "top right": ("右上角", "右上方"),
    "left": ("左边", "左侧"),
    "centre": ("中间", "中央", "中心"),
    "right": ("右边", "右侧"),
    "bottom left": ("左下角", "左下方"),
    "bottom": ("下方", "下面", "底部"),
    "bottom right": ("右下角", "右下方"),
}
_CHINESE_SIZES = {"small": "小", "medium": "", "big": "大"}
# Two objects never touch: each pair differs by two grid steps along an axis.
_APART = tuple(
    (first, second)
    for first in range(9)
    for second in range(9)
    if abs(first // 3 - second // 3) == 2 or abs(first % 3 - second % 3) == 2
)


@dataclass(frozen=True)
class SceneObject:
    """One object of a scene; every field is a word of this module's tuples."""

    shape: str
    colour: str
    position: str = DEFAULT_POSITION
    size: str = DEFAULT_SIZE


@dataclass(frozen=True)
class Scene:
    """What a caption means: a background colour and one or two objects in reading order."""

    background: str
    objects: tuple[SceneObject, ...]


def simple_scene(
    colour: str,
    shape: str,
    background: str = DEFAULT_BACKGROUND,
    position: str = DEFAULT_POSITION,
    size: str = DEFAULT_SIZE,
) -> Scene:
    """The scene of a prompt such as "a red circle on a blue background"."""
    return Scene(background, (SceneObject(shape, colour, position, size),))


def sample_scene(rng: random.Random, single_share: float = 0.75) -> Scene:
    """Draw a scene; background and object colours always differ from one another."""
    background, first_colour, second_colour = rng.sample(list(COLOURS), 3)
    if rng.random() < 0.15:
        background = DEFAULT_BACKGROUND
        first_colour, second_colour = rng.sample([name for name in COLOURS if name != background], 2)
    if rng.random() < single_share:
        position = DEFAULT_POSITION if rng.random() < 0.3 else rng.choice(POSITIONS)
        size = DEFAULT_SIZE if rng.random() < 0.5 else rng.choice(SIZES)
        return Scene(background, (SceneObject(rng.choice(SHAPES), first_colour, position, size),))
    cells = sorted(rng.choice(((3, 5), (1, 7), rng.choice(_APART))))
    objects = tuple(
        SceneObject(rng.choice(SHAPES), colour, POSITIONS[cell], rng.choice(("small", "medium", "medium")))
        for cell, colour in zip(cells, (first_colour, second_colour), strict=True)
    )
    return Scene(background, objects)


def caption_of(scene: Scene, rng: random.Random, chinese_share: float = 0.2) -> str:
    """Say a scene in one of its many ways."""
    if rng.random() < chinese_share:
        return _chinese_caption(scene, rng)
    caption = _english_caption(scene, rng)
    caption = rng.choice(("", "", "", "", "a picture of ", "an image of ", "draw ", "a photo of ")) + caption
    if rng.random() < 0.25:
        caption = caption[0].upper() + caption[1:]
    return caption + ("." if rng.random() < 0.15 else "")


def _english_object(item: SceneObject, rng: random.Random) -> str:
    size = {
        "small": rng.choice(("small", "tiny", "little")),
        "medium": "",
        "big": rng.choice(("big", "large")),
    }
    words = [size[item.size], item.colour, item.shape]
    noun = " ".join(word for word in words if word)
    article = "an" if noun[0] in "aeiou" else "a"
    return rng.choice((f"{article} {noun}",) * 5 + (noun, f"one {noun}"))


def _english_position(position: str, rng: random.Random) -> str:
    if position == "centre":
        return rng.choice(("in the centre", "in the center", "in the middle", "at the centre"))
    if " " in position:
        dashed = position.replace(" ", "-")
        return rng.choice(
            (f"in the {position}", f"in the {position} corner", f"at the {position}", f"in the {dashed}")
        )
    if position in ("left", "right"):
        return rng.choice((f"on the {position}", f"at the {position}", f"on the {position} side"))
    return rng.choice((f"at the {position}", f"in the {position}", f"on the {position}"))


def _placed_english_object(item: SceneObject, rng: random.Random, is_named: bool) -> str:
    noun = _english_object(item, rng)
    if not is_named:
        return noun
    return f"{noun} {_english_position(item.position, rng)}"


def _relation(
    scene: Scene, phrases: Mapping[str, tuple[str, ...]], rng: random.Random
) -> tuple[int, str] | None:
    """A phrase for two objects on one axis, and which of them is named first."""
    pair = tuple(item.position for item in scene.objects)
    kinds = {("left", "right"): ("left", "right"), ("top", "bottom"): ("above", "below")}
    if pair not in kinds or rng.random() < 0.3:
        return None
    first = rng.randrange(2)
    return first, rng.choice(phrases[kinds[pair][first]])


def _english_caption(scene: Scene, rng: random.Random) -> str:
    relation = None
    if len(scene.objects) == 2:
        phrases = {
            "left": ("to the left of", "left of"),
            "right": ("to the right of", "right of"),
            "above": ("above", "over"),
            "below": ("below", "under"),
        }
        relation = _relation(scene, phrases, rng)
    if relation is not None:
        first, phrase = relation
        nouns = [_english_object(item, rng) for item in scene.objects]
        body = f"{nouns[first]} {phrase} {nouns[1 - first]}"
    elif len(scene.objects) == 2:
        first = rng.randrange(2)
        parts = [_placed_english_object(item, rng, is_named=True) for item in scene.objects]
        body = f"{parts[first]}{rng.choice((' and ', ' and ', ', '))}{parts[1 - first]}"
    else:
        item = scene.objects[0]
        is_named = item.position != DEFAULT_POSITION or rng.random() < 0.25
        body = _placed_english_object(item, rng, is_named)
    if scene.background == DEFAULT_BACKGROUND and rng.random() < 0.4:
        return body
    article = "an" if scene.background[0] in "aeiou" else "a"
    background = f"{scene.background} background"
    return rng.choice(
        (
            f"{body} on {article} {background}",
            f"{body} on {article} {background}",
            f"{body} on {article} {background}",
            f"{body}, {background}",
            f"{body} with {article} {background}",
            f"{body} against {article} {background}",
            f"on {article} {background}, {body}",
            f"{article} {background} with {body}",
        )
    )


def _chinese_object(item: SceneObject, rng: random.Random) -> str:
    colour = _CHINESE_COLOURS[item.colour] + rng.choice(("色", "色", "色的", ""))
    shape = rng.choice(_CHINESE_SHAPES[item.shape])
    return rng.choice(("一个", "", "")) + colour + _CHINESE_SIZES[item.size] + shape


def _chinese_caption(scene: Scene, rng: random.Random) -> str:
    relation = None
    if len(scene.objects) == 2:
        phrases = {
            "left": ("左边", "左侧"),
            "right": ("右边", "右侧"),
            "above": ("上方", "上面"),
            "below": ("下方", "下面"),
        }
        relation = _relation(scene, phrases, rng)
    if relation is not None:
        first, phrase = relation
        nouns = [_chinese_object(item, rng) for item in scene.objects]
        body = f"{nouns[first]}在{nouns[1 - first]}的{phrase}"
    elif len(scene.objects) == 2:
        placed = [
            rng.choice(_CHINESE_POSITIONS[item.position])
            + rng.choice(("是", "有"))
            + _chinese_object(item, rng)
            for item in scene.objects
        ]
        first = rng.randrange(2)
        body = f"{placed[first]}，{placed[1 - first]}"
    else:
        item = scene.objects[0]
        noun = _chinese_object(item, rng)
        if item.position != DEFAULT_POSITION or rng.random() < 0.25:
            position = rng.choice(_CHINESE_POSITIONS[item.position])
            noun = rng.choice((f"{noun}在{position}", f"{position}有{noun}", f"{position}的{noun}"))
        body = noun
    if scene.background == DEFAULT_BACKGROUND and rng.random() < 0.4:
        return body
    background = _CHINESE_COLOURS[scene.background] + rng.choice(("色", "色", "")) + "背景"
    return rng.choice(
        (
            f"{body}在{background}上",
            f"{background}上的{body}",
            f"{background}上有{body}",
            f"{body}，{background}",
            f"{background}，{body}",
        )
    )
