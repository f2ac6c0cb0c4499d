from __future__ import annotations

import pytest

from hidream_grpc.devices.device_types import CPU, CUDA, NPU, DeviceType
from hidream_grpc.errors import ConfigurationError
from hidream_grpc.model.checkpoint.sizes import SizeLimits
from hidream_grpc.model.checkpoint.step_shapes import StepShape, choose_compile_shapes, parse_step_shapes

LIMITS = SizeLimits(size_multiple=16, max_pixels=1024 * 1024)


def test_shapes_are_width_height_and_samples_in_the_order_given() -> None:
    shapes = parse_step_shapes("1024x1024x2, 768x1360x16", LIMITS)
    assert shapes == (StepShape(1024, 1024, 2), StepShape(768, 1360, 16))


def test_a_shape_reads_as_it_is_written() -> None:
    for shape in (StepShape(768, 1360, 2), StepShape(768, 1360, 2, prompt_tokens=256)):
        assert parse_step_shapes(str(shape), LIMITS) == (shape,)


def test_a_fourth_number_is_the_length_of_the_prompts() -> None:
    shapes = parse_step_shapes("512x512x2x192,512x512x2x128", LIMITS)
    assert shapes == (StepShape(512, 512, 2, 192), StepShape(512, 512, 2))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "'' in '' is no width x height x samples"),
        ("1024x1024", "no width x height x samples, such as 1024x1024x2"),
        ("1024x1024x2,", "no width x height x samples"),
        ("1024x1024x0", "no width x height x samples"),
        ("1024×1024×2", "no width x height x samples"),
        ("1024x1024x1000", "no width x height x samples"),
        ("1024x1024x2x200", "or x prompt tokens too, which are 128, 192, 256"),
        ("64x64x1x128,64x64x1", "64x64x1 is named twice"),
        ("1000x1024x2", "1000x1024 cannot be generated: both sides must be multiples of 16 from 64 on"),
        ("32x1024x2", "32x1024 cannot be generated"),
        ("1040x1024x2", "width x height at most 1048576"),
        ("512x512x2,64x64x1,512x512x2", "512x512x2 is named twice"),
    ],
)
def test_what_is_no_list_of_shapes_or_cannot_be_drawn_is_refused(text: str, reason: str) -> None:
    with pytest.raises(ConfigurationError, match=r"^--compile-shapes: ") as refused:
        parse_step_shapes(text, LIMITS)
    assert reason in str(refused.value)


@pytest.mark.parametrize("device_type", [CPU, CUDA, NPU], ids=lambda device_type: device_type.name)
def test_nothing_is_compiled_that_was_not_asked_for(device_type: DeviceType) -> None:
    assert choose_compile_shapes(None, device_type, LIMITS) == ()


def test_a_device_type_that_cannot_compile_yet_says_so() -> None:
    assert choose_compile_shapes("64x64x2", CUDA, LIMITS) == (StepShape(64, 64, 2),)
    with pytest.raises(ConfigurationError, match=r"^--compile-shapes: not supported on npu yet$"):
        choose_compile_shapes("64x64x2", NPU, LIMITS)
