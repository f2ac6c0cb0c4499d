"""The shapes of denoising steps that an operator names, to be compiled at boot."""

from __future__ import annotations

import re
from dataclasses import dataclass

from hidream_grpc.devices.device_types import DeviceType
from hidream_grpc.errors import ConfigurationError
from hidream_grpc.model.checkpoint.prompt_lengths import PROMPT_TOKEN_BUCKETS, TRAINED_PROMPT_TOKENS
from hidream_grpc.model.checkpoint.sizes import ImageSize, SizeLimits

COMPILE_SHAPES_FLAG = "--compile-shapes"

_BUCKETS = "|".join(map(str, PROMPT_TOKEN_BUCKETS))


@dataclass(frozen=True, slots=True)
class StepShape:
    """The shape of a denoising step, on which its cost depends.

    Attributes:
        width, height: size of all its images, in pixels.
        num_samples: rows of the step, on all ranks together: two for each image with guidance, else one.
        prompt_tokens: length to which its prompts are padded, one of `PROMPT_TOKEN_BUCKETS`.
    """

    width: int
    height: int
    num_samples: int
    prompt_tokens: int = TRAINED_PROMPT_TOKENS

    def __str__(self) -> str:
        shape = f"{self.width}x{self.height}x{self.num_samples}"
        return shape if self.prompt_tokens == TRAINED_PROMPT_TOKENS else f"{shape}x{self.prompt_tokens}"


def choose_compile_shapes(
    asked: str | None, device_type: DeviceType, size_limits: SizeLimits
) -> tuple[StepShape, ...]:
    """The shapes to compile for; none where the operator named none.

    Args:
        asked: the operator's text, as `parse_step_shapes` reads it.
        device_type: type of the ranks' devices.
        size_limits: size limits of the checkpoint.

    Raises:
        ConfigurationError: the text is no list of shapes, or the device type cannot compile.
    """
    if asked is None:
        return ()
    if not device_type.can_compile:
        raise ConfigurationError(COMPILE_SHAPES_FLAG, f"not supported on {device_type.name} yet")
    return parse_step_shapes(asked, size_limits)


def parse_step_shapes(
    text: str, size_limits: SizeLimits, flag: str = COMPILE_SHAPES_FLAG
) -> tuple[StepShape, ...]:
    """Read shapes such as "1024x1024x2,768x1360x2x256": width × height × samples of a step.

    The fourth number is the length in tokens to which its prompts are padded; without it they are padded as
    the model was trained.

    Args:
        text: the operator's text.
        size_limits: size limits of the checkpoint.
        flag: flag of the text, for the text of the error.

    Raises:
        ConfigurationError: the text is no such list, names a shape twice, or names a size that the checkpoint
            cannot generate.
    """
    shapes: list[StepShape] = []
    for part in (part.strip() for part in text.split(",")):
        match = re.fullmatch(rf"([0-9]{{1,5}})x([0-9]{{1,5}})x([1-9][0-9]{{0,2}})(?:x({_BUCKETS}))?", part)
        if match is None:
            raise ConfigurationError(
                flag,
                f"{part!r} in {text!r} is no width x height x samples, such as 1024x1024x2, "
                f"or x prompt tokens too, which are {_BUCKETS.replace('|', ', ')}",
            )
        shape = StepShape(*(int(number) for number in match.groups() if number))
        if not size_limits.allows(ImageSize(shape.width, shape.height)):
            raise ConfigurationError(
                flag,
                f"{shape.width}x{shape.height} cannot be generated: both sides must be multiples of "
                f"{size_limits.size_multiple} from {size_limits.min_side_pixels} on, "
                f"width x height at most {size_limits.max_pixels}",
            )
        if shape in shapes:
            raise ConfigurationError(flag, f"{shape} is named twice in {text!r}")
        shapes.append(shape)
    return tuple(shapes)
