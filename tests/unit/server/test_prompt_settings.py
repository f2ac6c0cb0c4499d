from __future__ import annotations

import dataclasses

import pytest

from hidream_grpc.devices.device_types import CPU
from hidream_grpc.model.checkpoint.demo import demo_checkpoint_path
from hidream_grpc.model.checkpoint.description import CheckpointDescription, describe_checkpoint
from hidream_grpc.model.checkpoint.step_shapes import StepShape
from hidream_grpc.model.checkpoint.text_encoders import TextEncoderName
from hidream_grpc.server.configuration import compile_shapes, request_limits
from hidream_grpc.settings import load_settings

RELEASED = dict(zip(TextEncoderName, (218, 218, 256, 256), strict=True))


@pytest.fixture(scope="module")
def demo() -> CheckpointDescription:
    return describe_checkpoint(demo_checkpoint_path(), None)


@pytest.fixture
def released(demo: CheckpointDescription) -> CheckpointDescription:
    """The demo checkpoint with the limits of the released ones."""
    return dataclasses.replace(demo, prompt_token_limits=RELEASED)


def test_prompts_are_as_long_as_the_model_was_trained_for_unless_it_is_set(
    released: CheckpointDescription,
) -> None:
    limits = request_limits(load_settings({}, None), released)
    assert set(limits.max_prompt_tokens_by_encoder.values()) == {128}
    assert limits.max_prompt_tokens == released.trained_prompt_tokens == 128


@pytest.mark.parametrize("max_prompt_tokens", [150, 256])
def test_each_encoder_takes_what_is_set_as_far_as_it_can(
    max_prompt_tokens: int, released: CheckpointDescription, demo: CheckpointDescription
) -> None:
    settings = load_settings({"max_prompt_tokens": max_prompt_tokens}, None)
    limits = request_limits(settings, released)
    assert limits.max_prompt_tokens_by_encoder == {
        name: min(limit, max_prompt_tokens) for name, limit in RELEASED.items()
    }
    assert limits.max_prompt_tokens == min(218, max_prompt_tokens)
    # The demo's CLIPs have so many positions, its other tokenizers that limit.
    of_demo = {"CLIP-L": 128, "CLIP-G": 128, "T5": 64, "Llama": 64}
    assert request_limits(settings, demo).max_prompt_tokens_by_encoder == of_demo
    assert demo.trained_prompt_tokens == 64


@pytest.mark.parametrize(
    ("max_prompt_tokens", "shapes", "uncompiled"),
    [
        (128, "64x64x2", None),
        (150, "64x64x2", "192"),
        (256, "64x64x2", "192 or 256"),
        (256, "64x64x2x192,64x64x2x256", "128"),
        (256, "64x64x2,64x64x2x192,64x64x2x256", None),
        (256, None, None),
    ],
)
def test_the_log_says_which_prompts_run_uncompiled_where_others_are_compiled(
    max_prompt_tokens: int,
    shapes: str | None,
    uncompiled: str | None,
    released: CheckpointDescription,
    caplog: pytest.LogCaptureFixture,
) -> None:
    given = {"max_prompt_tokens": max_prompt_tokens, "compile_shapes": shapes}
    settings = load_settings({name: value for name, value in given.items() if value is not None}, None)
    chosen = compile_shapes(settings, CPU, released)
    assert (StepShape(64, 64, 2, 256) in chosen) == ("256" in (shapes or ""))
    said = f"prompts are padded to {uncompiled} tokens run uncompiled: --compile-shapes names none"
    assert caplog.messages == ([] if uncompiled is None else [f"steps whose {said}"])


def test_the_demo_has_no_long_prompts_to_compile_for(
    demo: CheckpointDescription, caplog: pytest.LogCaptureFixture
) -> None:
    compile_shapes(load_settings({"max_prompt_tokens": 256, "compile_shapes": "64x64x2"}, None), CPU, demo)
    assert not caplog.messages
