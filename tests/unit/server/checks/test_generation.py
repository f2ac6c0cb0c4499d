from __future__ import annotations

import dataclasses
import math
import struct
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from google.protobuf.message import DecodeError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hidream.v1 import image_gen_pb2, image_pb2, job_pb2
from hidream_grpc.engine.requests import Priority
from hidream_grpc.errors import FieldViolation, InvalidRequestError
from hidream_grpc.jobs.job import Submission
from hidream_grpc.jobs.limits import RequestDefaults, RequestLimits
from hidream_grpc.model.checkpoint.tokenizers.prompt_tokens import TokenCount
from hidream_grpc.model.parameters import OutputFormat
from hidream_grpc.server.checks.generation import RequestValidator
from hidream_grpc.server.status import to_status

LIMITS = RequestLimits(
    max_prompt_tokens=10,
    max_prompt_bytes=200,
    size_multiple=16,
    min_side_pixels=64,
    max_pixels=256 * 256,
    max_num_inference_steps=150,
    max_guidance_scale=7.3,
    max_num_images=8,
    max_seed=4000,
    max_queued_jobs=3,
    max_running_jobs=2,
    max_streams=10,
    max_request_id_bytes=32,
    max_labels=3,
    max_label_bytes=20,
    max_receive_message_bytes=1024 * 1024,
    chunk_bytes=1000,
    max_preview_side_pixels=128,
)
DEFAULTS = RequestDefaults(width=128, height=256, num_inference_steps=50, guidance_scale=5.0)


def count_words(prompt: str) -> tuple[TokenCount, ...]:
    num_tokens = len(prompt.split()) + 2
    return TokenCount("CLIP-L", 3), TokenCount("T5", num_tokens)


VALIDATOR = RequestValidator(LIMITS, DEFAULTS, count_words)


def request(prompt: str = "a red circle", **spec: Any) -> image_gen_pb2.GenerateRequest:
    return image_gen_pb2.GenerateRequest(spec=image_pb2.ImageSpec(prompt=prompt, **spec))


def checked(message: image_gen_pb2.GenerateRequest) -> Submission:
    return VALIDATOR.submission(message, caller="ipv4:127.0.0.1", deadline_seconds=None)


def violations_of(message: image_gen_pb2.GenerateRequest) -> tuple[FieldViolation, ...]:
    with pytest.raises(InvalidRequestError) as refused:
        checked(message)
    return refused.value.violations


def test_what_a_request_leaves_open_is_the_default_that_server_info_shows() -> None:
    parameters = checked(request()).parameters
    for field in dataclasses.fields(DEFAULTS):
        assert getattr(parameters, field.name) == getattr(DEFAULTS, field.name)
    assert (parameters.negative_prompt, parameters.output_format) == ("", OutputFormat.PNG)
    assert not parameters.with_previews


def test_what_a_request_says_is_what_is_done() -> None:
    message = request(
        "ein roter Kreis",
        negative_prompt="blue",
        width=64,
        height=1024,
        num_inference_steps=150,
        guidance_scale=2.5,
        num_images=8,
        seed=LIMITS.max_seed,
        output_format=image_pb2.OUTPUT_FORMAT_WEBP,
        quality=1,
    )
    message.MergeFrom(
        image_gen_pb2.GenerateRequest(
            request_id="r-1", preview=True, detached=True, priority=job_pb2.PRIORITY_HIGH, labels={"a": "b"}
        )
    )
    submission = VALIDATOR.submission(message, caller="me", deadline_seconds=3.5)
    parameters = submission.parameters
    for field in image_pb2.ImageSpec.DESCRIPTOR.fields:
        if field.name != "output_format":
            assert getattr(parameters, field.name) == getattr(message.spec, field.name)
    assert (parameters.output_format, parameters.with_previews) == (OutputFormat.WEBP, True)
    assert (submission.request_id, submission.caller, submission.deadline_seconds) == ("r-1", "me", 3.5)
    assert (submission.priority, submission.is_detached) == (Priority.HIGH, True)
    assert submission.labels == {"a": "b"}


@pytest.mark.parametrize("seconds", [-0.5, 300.5])
def test_a_reconnect_window_outside_its_limit_is_refused(seconds: float) -> None:
    message = request()
    message.reconnect_window.FromTimedelta(timedelta(seconds=seconds))
    assert violations_of(message) == (FieldViolation("reconnect_window", "must be 0 to 300 seconds"),)


def test_a_reconnect_window_needs_a_request_id() -> None:
    message = request()
    message.reconnect_window.FromSeconds(30)
    description = "needs a request_id, by which the job is found again"
    assert violations_of(message) == (FieldViolation("reconnect_window", description),)
    message.request_id = "mine"
    assert checked(message)


def test_a_retry_may_name_another_reconnect_window() -> None:
    again = request()
    again.request_id = "mine"
    again.reconnect_window.FromSeconds(30)
    assert checked(again).request_digest == checked(request()).request_digest


@pytest.mark.parametrize(
    ("limits", "counts", "told"),
    [
        ({"CLIP-L": 128, "T5": 100, "Llama": 100}, (130, 125, 127), "100 tokens of Llama, is 127"),
        ({"CLIP-L": 218, "T5": 256, "Llama": 256}, (230, 258, 250), "218 tokens of CLIP-L, is 230"),
        ({"CLIP-L": 218, "T5": 256, "Llama": 256}, (219, 400, 250), "256 tokens of T5, is 400"),
        # A server of an earlier version tells one number for all.
        ({}, (9, 9, 12), "10 tokens of Llama, is 12"),
    ],
)
def test_of_several_token_limits_that_of_the_tightest_encoder_is_told(
    limits: dict[str, int], counts: tuple[int, ...], told: str
) -> None:
    validator = RequestValidator(
        dataclasses.replace(LIMITS, max_prompt_tokens_by_encoder=limits),
        DEFAULTS,
        lambda prompt: tuple(map(TokenCount, ("CLIP-L", "T5", "Llama"), counts)),
    )
    with pytest.raises(InvalidRequestError) as caught:
        validator.submission(request(), caller="ipv4:127.0.0.1", deadline_seconds=None)
    assert caught.value.violations[0].description == f"must be at most {told}"


@pytest.mark.parametrize(
    ("num_words", "num_negative_words", "prompt_tokens"),
    [(3, 0, 128), (126, 126, 128), (127, 0, 192), (1, 127, 192), (190, 3, 192), (191, 3, 256), (3, 254, 256)],
)
def test_both_prompts_of_a_request_are_padded_to_the_bucket_of_the_longer_one(
    num_words: int, num_negative_words: int, prompt_tokens: int
) -> None:
    limits = dataclasses.replace(LIMITS, max_prompt_tokens=256, max_prompt_bytes=2000)
    message = request("a " * num_words, negative_prompt="a " * num_negative_words)
    submission = RequestValidator(limits, DEFAULTS, count_words).submission(message, "me", None)
    assert submission.parameters.prompt_tokens == prompt_tokens
    assert {prompt.num_tokens for prompt in submission.parameters.prompts} == {prompt_tokens}


def test_zero_is_not_taken_for_absent() -> None:
    assert checked(request(seed=0, guidance_scale=0.0)).parameters.guidance_scale == 0.0
    assert checked(request(seed=0)).parameters.seed == 0
    (violation,) = violations_of(request(num_images=0))
    assert violation.field == "spec.num_images"


def test_a_retry_with_the_same_request_id_draws_from_the_same_seed_and_others_do_not() -> None:
    named = request()
    named.request_id = "r-1"
    assert checked(named) == checked(named)
    assert len({checked(request()).parameters.seed for _ in range(50)}) > 10


BAD: dict[str, tuple[Callable[[image_gen_pb2.GenerateRequest], object], str, str]] = {
    "empty prompt": (lambda r: r.spec.ClearField("prompt"), "spec.prompt", "empty"),
    "blank prompt": (lambda r: setattr(r.spec, "prompt", " \n\t　"), "spec.prompt", "empty"),
    "prompt of too many bytes": (lambda r: setattr(r.spec, "prompt", "é" * 101), "spec.prompt", "200 bytes"),
    "prompt of too many tokens": (
        lambda r: setattr(r.spec, "prompt", "a " * 9),
        "spec.prompt",
        "10 tokens of T5",
    ),
    "prompt with NUL": (lambda r: setattr(r.spec, "prompt", "a\0b"), "spec.prompt", "NUL"),
    "negative prompt of too many bytes": (
        lambda r: setattr(r.spec, "negative_prompt", "x" * 201),
        "spec.negative_prompt",
        "200 bytes",
    ),
    "negative prompt of too many tokens": (
        lambda r: setattr(r.spec, "negative_prompt", "a " * 9),
        "spec.negative_prompt",
        "10 tokens of T5",
    ),
    "negative prompt without guidance": (
        lambda r: r.spec.MergeFrom(image_pb2.ImageSpec(negative_prompt="blue", guidance_scale=1.0)),
        "spec.negative_prompt",
        "guidance_scale above 1",
    ),
    "width alone": (lambda r: setattr(r.spec, "width", 64), "spec.height", "together"),
    "height alone": (lambda r: setattr(r.spec, "height", 64), "spec.width", "together"),
    "no steps": (lambda r: setattr(r.spec, "num_inference_steps", 0), "spec.num_inference_steps", "1 to 150"),
    "many steps": (
        lambda r: setattr(r.spec, "num_inference_steps", 2_000_000),
        "spec.num_inference_steps",
        "1 to 150, is 2000000",
    ),
    "no images": (lambda r: setattr(r.spec, "num_images", 0), "spec.num_images", "1 to 8"),
    "many images": (lambda r: setattr(r.spec, "num_images", 9), "spec.num_images", "1 to 8, is 9"),
    "negative guidance": (
        lambda r: setattr(r.spec, "guidance_scale", -0.1),
        "spec.guidance_scale",
        "0 to 7.3",
    ),
    "strong guidance": (lambda r: setattr(r.spec, "guidance_scale", 7.31), "spec.guidance_scale", "0 to 7.3"),
    "guidance is not a number": (
        lambda r: setattr(r.spec, "guidance_scale", math.nan),
        "spec.guidance_scale",
        "0 to 7.3",
    ),
    "guidance without end": (
        lambda r: setattr(r.spec, "guidance_scale", math.inf),
        "spec.guidance_scale",
        "0 to 7.3",
    ),
    "negative seed": (lambda r: setattr(r.spec, "seed", -1), "spec.seed", f"0 to {LIMITS.max_seed}, is -1"),
    "large seed": (
        lambda r: setattr(r.spec, "seed", LIMITS.max_seed + 1),
        "spec.seed",
        f"0 to {LIMITS.max_seed}",
    ),
    "unknown format": (lambda r: setattr(r.spec, "output_format", 9), "spec.output_format", "9"),
    "quality of PNG": (lambda r: setattr(r.spec, "quality", 90), "spec.quality", "PNG"),
    "no quality": (
        lambda r: r.spec.MergeFrom(
            image_pb2.ImageSpec(quality=0, output_format=image_pb2.OUTPUT_FORMAT_JPEG)
        ),
        "spec.quality",
        "1 to 100",
    ),
    "too much quality": (
        lambda r: r.spec.MergeFrom(
            image_pb2.ImageSpec(quality=101, output_format=image_pb2.OUTPUT_FORMAT_WEBP)
        ),
        "spec.quality",
        "1 to 100",
    ),
    "long request id": (lambda r: setattr(r, "request_id", "r" * 33), "request_id", "32 bytes"),
    "request id with a space": (lambda r: setattr(r, "request_id", "a b"), "request_id", "visible ASCII"),
    "request id with a new line": (lambda r: setattr(r, "request_id", "a\nb"), "request_id", "visible ASCII"),
    "request id beyond ASCII": (lambda r: setattr(r, "request_id", "é"), "request_id", "visible ASCII"),
    "unknown priority": (lambda r: setattr(r, "priority", 77), "priority", "77"),
    "many labels": (lambda r: r.labels.update(dict.fromkeys("abcd", "")), "labels", "3 labels, are 4"),
    "label without a key": (lambda r: r.labels.update({"": "x"}), "labels[]", "empty"),
    "long key of a label": (lambda r: r.labels.update({"k" * 21: "x"}), f"labels[{'k' * 21}]", "20 bytes"),
    "long value of a label": (lambda r: r.labels.update({"k": "é" * 11}), "labels[k]", "20 bytes"),
}


@pytest.mark.parametrize(("change", "field", "words"), BAD.values(), ids=list(BAD))
def test_each_bad_field_is_named_with_its_limit(
    change: Callable[[image_gen_pb2.GenerateRequest], object], field: str, words: str
) -> None:
    message = request()
    change(message)
    (violation,) = violations_of(message)
    assert violation.field == field
    assert words in violation.description


def test_a_request_without_a_spec_is_told_so() -> None:
    assert violations_of(image_gen_pb2.GenerateRequest())[0] == FieldViolation("spec", "is required")


def test_all_violations_are_told_at_once() -> None:
    message = request(
        "",
        negative_prompt="\0",
        width=65,
        height=-1,
        num_inference_steps=0,
        guidance_scale=math.nan,
        num_images=99,
        seed=-5,
        output_format=7,
        quality=101,
    )
    message.MergeFrom(image_gen_pb2.GenerateRequest(request_id="a b", labels={"": ""}))
    message.priority = 9  # type: ignore[assignment]
    told = {violation.field for violation in violations_of(message)}
    spec = {f"spec.{field.name}" for field in image_pb2.ImageSpec.DESCRIPTOR.fields}
    assert told == spec | {"request_id", "priority", "labels[]"}


@pytest.mark.parametrize("num_labels", [1, 5, 100, 5000])
def test_what_is_wrong_fits_the_headers_that_clients_accept(num_labels: int) -> None:
    message = request(
        "",
        negative_prompt="界\0" * 30,
        width=-(2**31),
        height=2**31 - 1,
        num_inference_steps=-(2**31),
        guidance_scale=math.nan,
        num_images=-(2**31),
        seed=-(2**63),
        output_format=-(2**31),
        quality=-(2**31),
    )
    message.request_id = "界" * 9999
    message.priority = -(2**31)  # type: ignore[assignment]
    for number in range(num_labels):
        message.labels["界" * 50 + str(number)] = "x"
    with pytest.raises(InvalidRequestError) as refused:
        checked(message)
    status = to_status(refused.value)
    # The text is percent-encoded, the details are in base64.
    text_bytes = sum(1 if " " <= c <= "~" else 3 * len(c.encode()) for c in status.message)
    assert text_bytes + len(status.SerializeToString()) * 4 / 3 < 8000


@pytest.mark.parametrize(
    ("width", "height"), [(64, 64), (256, 256), (64, 1024), (1024, 64), (80, 816)], ids=lambda side: str(side)
)
def test_every_size_within_the_limits_is_taken_as_it_is(width: int, height: int) -> None:
    parameters = checked(request(width=width, height=height)).parameters
    assert (parameters.width, parameters.height) == (width, height)


@pytest.mark.parametrize(
    ("width", "height", "fields"),
    [
        (63, 64, {"spec.width"}),
        (64, 48, {"spec.height"}),
        (0, 0, {"spec.width", "spec.height"}),
        (72, 128, {"spec.width"}),
        (-64, 64, {"spec.width"}),
        (272, 256, {"spec.width", "spec.height"}),
        (2**31 - 16, 2**31 - 16, {"spec.width", "spec.height"}),
    ],
)
def test_a_size_that_does_not_work_is_refused(width: int, height: int, fields: set[str]) -> None:
    assert {violation.field for violation in violations_of(request(width=width, height=height))} == fields


@given(st.integers(-100, 2000), st.integers(4, 64).map(lambda n: 16 * n))
def test_the_nearest_side_that_is_told_works(width: int, height: int) -> None:
    message = request(width=width, height=height)
    try:
        checked(message)
    except InvalidRequestError as error:
        by_field = {violation.field: violation.description for violation in error.violations}
        message.spec.width = int(by_field["spec.width"].rpartition(" ")[2])
    assert checked(message).parameters.height == height


LONG = RequestValidator(dataclasses.replace(LIMITS, max_pixels=64 * 70_000), DEFAULTS, count_words)
"""The limits of a model that makes longer images than some formats hold."""


@pytest.mark.parametrize(
    ("output_format", "longest", "limit"),
    [
        (image_pb2.OUTPUT_FORMAT_JPEG, 65_488, "65500 for JPEG"),
        (image_pb2.OUTPUT_FORMAT_WEBP, 16_368, "16383 for WEBP"),
    ],
    ids=["JPEG", "WebP"],
)
def test_a_side_that_its_format_cannot_hold_is_refused_and_the_nearest_is_told(
    output_format: image_pb2.OutputFormat.ValueType, longest: int, limit: str
) -> None:
    for width, height in ((longest, 64), (64, longest)):
        fits = request(width=width, height=height, output_format=output_format)
        assert LONG.submission(fits, "me", None).parameters.width == width
        too_long: dict[str, Any] = {"width": width, "height": height}
        name = "width" if width == longest else "height"
        too_long[name] += LIMITS.size_multiple
        with pytest.raises(InvalidRequestError) as refused:
            LONG.submission(request(**too_long, output_format=output_format), "me", None)
        (violation,) = refused.value.violations
        assert violation.field == f"spec.{name}"
        assert limit in violation.description
        assert violation.description.endswith(f"the nearest that works is {longest}")
    assert LONG.submission(request(width=70_000 // 16 * 16, height=64), "me", None), "a PNG holds it"


def test_a_default_size_that_the_format_cannot_hold_is_refused_too() -> None:
    long = RequestValidator(
        dataclasses.replace(LIMITS, max_pixels=64 * 16_384),
        dataclasses.replace(DEFAULTS, width=64, height=16_384),
        count_words,
    )
    with pytest.raises(InvalidRequestError) as refused:
        long.submission(request(output_format=image_pb2.OUTPUT_FORMAT_WEBP), "me", None)
    assert [violation.field for violation in refused.value.violations] == ["spec.height"]


def test_the_largest_guidance_scale_that_server_info_shows_is_taken() -> None:
    shown = struct.unpack("f", struct.pack("f", LIMITS.max_guidance_scale))[0]
    assert shown > LIMITS.max_guidance_scale
    assert checked(request(guidance_scale=shown)).parameters.guidance_scale == shown


int32 = st.one_of(
    st.integers(-(2**31), 2**31 - 1), st.integers(-2, 200), st.integers(0, 20).map(lambda n: 16 * n)
)
int64 = st.one_of(st.integers(-(2**63), 2**63 - 1), st.integers(-2, 10))
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


def specs() -> st.SearchStrategy[image_pb2.ImageSpec]:
    fields: dict[str, st.SearchStrategy[Any]] = {
        "prompt": text,
        "negative_prompt": text,
        "width": int32,
        "height": int32,
        "num_inference_steps": int32,
        "guidance_scale": st.floats(width=32),
        "num_images": int32,
        "seed": int64,
        "output_format": st.integers(-3, 6),
        "quality": int32,
    }
    return st.fixed_dictionaries({}, optional=fields).map(
        lambda given_fields: image_pb2.ImageSpec(**given_fields)
    )


requests = st.builds(
    image_gen_pb2.GenerateRequest,
    spec=specs(),
    request_id=text,
    preview=st.booleans(),
    detached=st.booleans(),
    priority=st.integers(-2, 6),
    labels=st.dictionaries(text, text, max_size=5),
)


def assert_within_limits(submission: Submission) -> None:
    parameters = submission.parameters
    assert parameters.prompt.strip()
    for prompt in (parameters.prompt, parameters.negative_prompt):
        assert len(prompt.encode()) <= LIMITS.max_prompt_bytes
        assert all(count.num_tokens <= LIMITS.max_prompt_tokens for count in count_words(prompt))
    for side in (parameters.width, parameters.height):
        assert side >= LIMITS.min_side_pixels
        assert side % LIMITS.size_multiple == 0
    assert parameters.width * parameters.height <= LIMITS.max_pixels
    assert 1 <= parameters.num_inference_steps <= LIMITS.max_num_inference_steps
    assert 0 <= parameters.guidance_scale <= LIMITS.max_guidance_scale + 1e-6
    assert parameters.uses_guidance or not parameters.negative_prompt
    assert 1 <= parameters.num_images <= LIMITS.max_num_images
    assert 0 <= parameters.seed <= LIMITS.max_seed
    assert 1 <= parameters.quality <= 100
    assert 1 <= len(submission.request_id) <= LIMITS.max_request_id_bytes
    assert len(submission.labels) <= LIMITS.max_labels


@given(requests)
@settings(max_examples=500, suppress_health_check=[HealthCheck.too_slow])
def test_any_request_is_refused_in_detail_or_is_within_every_limit(
    message: image_gen_pb2.GenerateRequest,
) -> None:
    try:
        submission = checked(message)
    except InvalidRequestError as error:
        assert error.violations
        assert all(violation.field and violation.description for violation in error.violations)
    else:
        assert_within_limits(submission)


@given(specs(), st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), max_size=4))
def test_mutated_bytes_that_still_parse_are_refused_in_detail_or_are_within_every_limit(
    spec: image_pb2.ImageSpec, changes: list[tuple[int, int]]
) -> None:
    data = bytearray(image_gen_pb2.GenerateRequest(spec=spec).SerializeToString())
    for position, value in changes:
        if position < len(data):
            data[position] = value
    try:
        message = image_gen_pb2.GenerateRequest.FromString(bytes(data))
    except DecodeError:
        return
    try:
        submission = checked(message)
    except InvalidRequestError as error:
        assert error.violations
    else:
        assert_within_limits(submission)


def test_a_request_that_is_more_than_a_callers_minute_is_refused_with_the_limit() -> None:
    pixel_steps = 128 * 256 * 50 * 2
    for limit, fits in ((pixel_steps, True), (pixel_steps - 1, False)):
        limits = dataclasses.replace(LIMITS, max_pixel_steps_per_minute_per_caller=limit)
        validator = RequestValidator(limits, DEFAULTS, count_words)
        if fits:
            assert validator.submission(request(num_images=2), "me", None).parameters.pixel_steps == limit
            continue
        with pytest.raises(InvalidRequestError) as refused:
            validator.submission(request(num_images=2), "me", None)
        (violation,) = refused.value.violations
        assert violation.field == "spec"
        assert f"at most {limit} (max_pixel_steps_per_minute_per_caller)" in violation.description


async def test_long_prompts_are_counted_once_each_beside_the_event_loop_and_short_ones_in_it() -> None:
    counted: list[tuple[str, int]] = []

    def count(prompt: str) -> tuple[TokenCount, ...]:
        counted.append((prompt, threading.get_ident()))
        return count_words(prompt)

    def batch(*prompts: str) -> list[image_gen_pb2.SubmitJobRequest]:
        return [
            image_gen_pb2.SubmitJobRequest(spec=image_pb2.ImageSpec(prompt=prompt, guidance_scale=5))
            for prompt in prompts
        ]

    def validator() -> RequestValidator:
        return RequestValidator(dataclasses.replace(LIMITS, max_queued_jobs=10), DEFAULTS, count)

    long_prompts = ["a" * 199 + str(number) for number in range(4)]
    await validator().batch(batch(*long_prompts, long_prompts[0]), "me")
    assert sorted(prompt for prompt, _ in counted if prompt) == long_prompts
    assert {thread for prompt, thread in counted if prompt}.isdisjoint({threading.get_ident()})
    counted.clear()
    await validator().one(request("a red circle"), "me", None)
    assert ("a red circle", threading.get_ident()) in counted
    counted.clear()
    # What is refused for its bytes is not counted at all.
    with pytest.raises(InvalidRequestError):
        await validator().batch(batch("b" * 5000, *long_prompts[:3]), "me")
    assert "b" * 5000 not in {prompt for prompt, _ in counted}
