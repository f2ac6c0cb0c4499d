"""What makes two requests the same: all that their callers sent, and nothing that a server adds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from hidream.v1 import image_gen_pb2, image_pb2, job_pb2
from hidream_grpc.jobs.job import ModelIdentity, Submission, asks_for_the_same
from hidream_grpc.jobs.limits import RequestDefaults
from hidream_grpc.server.checks.submissions import JobRequest, submission_of

DEFAULTS = RequestDefaults(width=128, height=256, num_inference_steps=50, guidance_scale=5.0)
OTHER_DEFAULTS = RequestDefaults(width=64, height=64, num_inference_steps=9, guidance_scale=0, quality=80)
FULL = ModelIdentity("full", "full", "0123456789abcdef")
DEV = ModelIdentity("dev", "dev", "fedcba9876543210")
UNKNOWN_FIELD = b"\xfa\x3f\x03new"
"""Number 1023, of a newer contract."""


def generate(**fields: Any) -> image_gen_pb2.GenerateRequest:
    spec = image_pb2.ImageSpec(prompt="a red circle", num_images=2)
    request = image_gen_pb2.GenerateRequest(spec=spec, request_id="r-1", labels={"a": "1", "b": "2"})
    request.MergeFrom(image_gen_pb2.GenerateRequest(**fields))
    return request


def accepted(request: JobRequest) -> Submission:
    return submission_of(request, "me", 3.0, DEFAULTS, 1000, FULL)


def of_before(submission: Submission) -> Submission:
    """The submission as a server kept it that knew no digests of what callers send."""
    return dataclasses.replace(submission, request_digest="", left_open=())


def retried(request: JobRequest) -> Submission:
    model = FULL if request.model == FULL.name else DEV
    return submission_of(request, "another host", None, OTHER_DEFAULTS, 77, model)


def with_unknown(request: JobRequest, is_in_spec: bool = False) -> JobRequest:
    copy = type(request)()
    copy.CopyFrom(request)  # type: ignore[arg-type]
    (copy.spec if is_in_spec else copy).MergeFromString(UNKNOWN_FIELD)
    return copy


SAME: dict[str, tuple[JobRequest, JobRequest]] = {
    "same bytes": (generate(), generate()),
    "labels in another order": (
        generate(),
        image_gen_pb2.GenerateRequest(spec=generate().spec, request_id="r-1", labels={"b": "2", "a": "1"}),
    ),
    "SubmitJob, and Generate detached": (
        generate(detached=True, preview=True, priority=job_pb2.PRIORITY_LOW, model="full"),
        image_gen_pb2.SubmitJobRequest(
            spec=generate().spec,
            request_id="r-1",
            labels=generate().labels,
            preview=True,
            priority=job_pb2.PRIORITY_LOW,
            model="full",
        ),
    ),
    "a field of a newer contract": (with_unknown(generate()), with_unknown(generate())),
}


@pytest.mark.parametrize(("first", "second"), SAME.values(), ids=SAME.keys())
def test_what_callers_send_alike_is_the_same_whatever_the_server_adds(
    first: JobRequest, second: JobRequest
) -> None:
    assert asks_for_the_same(retried(second), accepted(first))
    assert asks_for_the_same(retried(second), of_before(accepted(first)))
    kept = msgspec.json.decode(msgspec.json.encode(accepted(first)), type=Submission)
    assert asks_for_the_same(retried(second), kept)


DIFFERENT: dict[str, Callable[[], JobRequest]] = {
    "prompt": lambda: generate(spec=image_pb2.ImageSpec(prompt="a blue circle")),
    "steps": lambda: generate(spec=image_pb2.ImageSpec(num_inference_steps=3)),
    "images": lambda: generate(spec=image_pb2.ImageSpec(num_images=1)),
    "format": lambda: generate(spec=image_pb2.ImageSpec(output_format=image_pb2.OUTPUT_FORMAT_WEBP)),
    "preview": lambda: generate(preview=True),
    "detached": lambda: generate(detached=True),
    "priority": lambda: generate(priority=job_pb2.PRIORITY_HIGH),
    "labels": lambda: generate(labels={"c": ""}),
    "model": lambda: generate(model="dev"),
}


@pytest.mark.parametrize("other", DIFFERENT.values(), ids=DIFFERENT.keys())
def test_another_content_is_another_request_also_beside_a_row_of_before(
    other: Callable[[], JobRequest],
) -> None:
    assert not asks_for_the_same(retried(other()), accepted(generate()))
    assert not asks_for_the_same(retried(other()), of_before(accepted(generate())))


@pytest.mark.parametrize("is_in_spec", [False, True], ids=["envelope", "spec"])
def test_a_field_that_this_server_does_not_know_is_content(is_in_spec: bool) -> None:
    for request in (generate(), image_gen_pb2.SubmitJobRequest(spec=generate().spec, request_id="r-1")):
        assert not asks_for_the_same(retried(with_unknown(request, is_in_spec)), accepted(request))


def test_a_field_that_spells_its_default_is_not_one_that_was_left_out() -> None:
    spelt = generate(spec=image_pb2.ImageSpec(width=DEFAULTS.width, height=DEFAULTS.height))
    assert accepted(spelt).parameters == accepted(generate()).parameters
    assert not asks_for_the_same(retried(spelt), accepted(generate()))


def test_the_request_id_is_no_content() -> None:
    assert accepted(generate()).request_digest == accepted(generate(request_id="r-2")).request_digest
