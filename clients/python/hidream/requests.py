"""Requests from keyword arguments, in one place for both transports."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar

from google.protobuf.message import Message

from hidream.errors import FieldViolation, InvalidArgumentError
from hidream.v1 import image_gen_pb2, image_pb2, job_pb2

# Names may be written in any case.
OutputFormat = Literal["PNG", "JPEG", "WEBP", "png", "jpeg", "webp"]
Priority = Literal["LOW", "NORMAL", "HIGH", "low", "normal", "high"]
JobStateName = Literal[
    "QUEUED",
    "RUNNING",
    "SUCCEEDED",
    "FAILED",
    "CANCELLED",
    "queued",
    "running",
    "succeeded",
    "failed",
    "cancelled",
]
JobOrId = job_pb2.Job | str

NO_LABELS: Mapping[str, str] = {}

_RequestT = TypeVar("_RequestT", bound=Message)


def generate_request(
    prompt: str,
    *,
    negative_prompt: str | None = None,
    width: int | None = None,
    height: int | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    num_images: int | None = None,
    seed: int | None = None,
    output_format: OutputFormat | None = None,
    quality: int | None = None,
    request_id: str | None = None,
    preview: bool | None = None,
    priority: Priority | None = None,
    labels: Mapping[str, str] | None = None,
    model: str | None = None,
    detached: bool | None = None,
) -> image_gen_pb2.GenerateRequest:
    """The request of `generate` for these arguments, which are those of `submit_request` but for one.

    Args:
        detached: let the job go on when the call ends early.

    Raises:
        InvalidArgumentError: as of `submit_request`.
    """
    # Each argument has the name of its field.
    return _filled(image_gen_pb2.GenerateRequest(), locals())


def submit_request(
    prompt: str,
    *,
    negative_prompt: str | None = None,
    width: int | None = None,
    height: int | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    num_images: int | None = None,
    seed: int | None = None,
    output_format: OutputFormat | None = None,
    quality: int | None = None,
    request_id: str | None = None,
    preview: bool | None = None,
    priority: Priority | None = None,
    labels: Mapping[str, str] | None = None,
    model: str | None = None,
) -> image_gen_pb2.SubmitJobRequest:
    """The request of `submit`, and one of `batch`, for these arguments; None means the server's default.

    Ranges and defaults are the server's (`info().limits`, `info().defaults`); what each means in full
    stands in `protos/hidream/v1/image.proto`. Only what cannot be written into the message is refused
    here (a number of 65 bits, an unknown format, text that is no UTF-8); every limit is the server's to
    check.

    Args:
        prompt: what to generate.
        negative_prompt: what to keep away from; works through guidance.
        width, height: in pixels; both or neither.
        num_inference_steps: denoising steps.
        guidance_scale: how closely to follow the prompt; 1 or less is none, in half the time, and gives
            poor images of a model that is trained with guidance, such as Full.
        num_images: number of images; image i is generated from seed + i.
        seed: seed of image 0; the server picks one when absent, and `Started.spec` says which.
        output_format: file format of the images.
        quality: quality of JPEG and WebP, 1 to 100.
        request_id: a name for this request, so that a retry does not draw twice.
        preview: also send a small preview of image 0 after each step.
        priority: which jobs go first when several wait.
        labels: free labels, to find the job again.
        model: which one generates, one of `info().live_models`; the server's own when absent.

    Raises:
        InvalidArgumentError: names every argument that no message can carry.
    """
    return _filled(image_gen_pb2.SubmitJobRequest(), locals())


def job_id_of(job: JobOrId) -> str:
    """The id of a job that is given by its id, or as a call returned it."""
    return job if isinstance(job, str) else job.job_id


def with_request_id(request: _RequestT) -> _RequestT:
    """Return a copy of a request that has an id, so that a retry does not generate twice."""
    named = type(request)()
    named.CopyFrom(request)
    if not named.request_id:  # type: ignore[attr-defined]
        named.request_id = uuid.uuid4().hex  # type: ignore[attr-defined]
    return named


def list_request(
    states: Iterable[JobStateName], labels: Mapping[str, str], page_size: int, page_token: str
) -> image_gen_pb2.ListJobsRequest:
    """The request for one page of `list_jobs`; raises InvalidArgumentError as `generate_request` does."""
    fields = {"states": states, "labels": labels, "page_size": page_size, "page_token": page_token}
    return _filled(image_gen_pb2.ListJobsRequest(), fields)


def watch_jobs_request(
    states: Iterable[JobStateName], labels: Mapping[str, str]
) -> image_gen_pb2.WatchJobsRequest:
    """The request of `watch_all`; raises InvalidArgumentError as `generate_request` does."""
    return _filled(image_gen_pb2.WatchJobsRequest(), {"states": states, "labels": labels})


def _filled(request: _RequestT, arguments: Mapping[str, Any]) -> _RequestT:
    own_fields = request.DESCRIPTOR.fields_by_name
    violations = []
    if "spec" in own_fields:
        request.spec.SetInParent()  # type: ignore[attr-defined]
    for name, value in arguments.items():
        if value is None:
            continue
        is_of_spec = "spec" in own_fields and name in image_pb2.ImageSpec.DESCRIPTOR.fields_by_name
        try:
            _set(request.spec if is_of_spec else request, name, value)  # type: ignore[attr-defined]
        except (TypeError, ValueError) as error:
            violations.append(FieldViolation(f"spec.{name}" if is_of_spec else name, str(error)))
    if violations:
        raise InvalidArgumentError.from_violations(tuple(violations))
    return request


def _set(message: Any, name: str, value: Any) -> None:
    match name:
        case "labels":
            message.labels.update(value)
        case "states":
            message.states.extend(
                job_pb2.JobState.Value(f"JOB_STATE_{str(state).upper()}") for state in value
            )
        case "output_format":
            message.output_format = image_pb2.OutputFormat.Value(f"OUTPUT_FORMAT_{_upper(value)}")
        case "priority":
            message.priority = job_pb2.Priority.Value(f"PRIORITY_{_upper(value)}")
        case _:
            setattr(message, name, value)


def _upper(name: object) -> str:
    return str(name).upper()
