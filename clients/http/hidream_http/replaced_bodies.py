"""Bodies of the replaced server: what it took, what it answered, and what is the same in the contract."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from datetime import UTC
from typing import Annotated, Any, TypeVar

from google.protobuf.timestamp_pb2 import Timestamp
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import Request

from hidream.errors import FieldViolation, InvalidArgumentError
from hidream.requests import submit_request, with_request_id
from hidream.v1 import image_gen_pb2, job_pb2
from hidream_http.json_bodies import require_json

_BodyT = TypeVar("_BodyT", bound=BaseModel)

MAX_IMAGE_INDEX = 2**31 - 1

_RESOLUTION = re.compile(r"([1-9]\d{0,8})x([1-9]\d{0,8})")
_WORDS = {
    job_pb2.JOB_STATE_QUEUED: "queued",
    job_pb2.JOB_STATE_RUNNING: "processing",
    job_pb2.JOB_STATE_SUCCEEDED: "completed",
    job_pb2.JOB_STATE_FAILED: "failed",
    job_pb2.JOB_STATE_CANCELLED: "cancelled",
}
_NAMES = {
    "width": "resolution",
    "height": "resolution",
    "num_images": "num_images_per_prompt",
}


class InvalidBodyError(Exception):
    """A request that is refused before it is sent on.

    Attributes:
        errors: what is wrong, an entry each, as FastAPI has them.
    """

    def __init__(self, errors: list[dict[str, Any]]) -> None:
        super().__init__(errors)
        self.errors = errors


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class SubmitBody(_Body):
    """One task; a field that is absent or null is the server's to decide."""

    prompt: str
    negative_prompt: str | None = None
    resolution: Annotated[str, Field(pattern=f"^{_RESOLUTION.pattern}$")] | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    num_images_per_prompt: int | None = None
    seed: int | None = None

    def message(self) -> image_gen_pb2.SubmitJobRequest:
        """The same as a request of the contract.

        Raises:
            InvalidArgumentError: a number has more bits than the contract has for it.
        """
        width, height = map(int, self.resolution.split("x")) if self.resolution else (None, None)
        return submit_request(
            self.prompt,
            negative_prompt=self.negative_prompt,
            width=width,
            height=height,
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            num_images=self.num_images_per_prompt,
            seed=self.seed,
        )


class BatchBody(_Body):
    """Many tasks."""

    requests: list[SubmitBody]

    def message(self) -> image_gen_pb2.BatchSubmitJobsRequest:
        """The same as a request of the contract.

        Raises:
            InvalidArgumentError: as of `SubmitBody.message`, with the place of each task in front.
        """
        message, violations = image_gen_pb2.BatchSubmitJobsRequest(), []
        for index, request in enumerate(self.requests):
            try:
                message.requests.append(with_request_id(request.message()))
            except InvalidArgumentError as error:
                violations += [
                    FieldViolation(f"requests[{index}].{one.field}", one.description)
                    for one in error.violations
                ]
        if violations:
            raise InvalidArgumentError.from_violations(tuple(violations))
        return message


class NoQuery(_Body):
    """Nothing: all fields stand in the body."""


class DownloadQuery(_Body):
    """Which image of a task."""

    image_index: Annotated[int, Field(ge=0, le=MAX_IMAGE_INDEX)] = 0


async def read_body(request: Request, kind: type[_BodyT]) -> _BodyT:
    """The body of a request.

    Raises:
        InvalidBodyError: it is no JSON, or has fields or values that it must not have.
        ProblemError: it is said to be something else than JSON, or is too large.
    """
    require_json(request)
    read_query(request, NoQuery)
    body = await request.body()
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise _invalid("body", error) from None


def read_query(request: Request, kind: type[_BodyT]) -> _BodyT:
    """The query of a request; raises InvalidBodyError as `read_body` does."""
    given = request.query_params
    # No parameter is a list: one that is given twice is refused by its name.
    query = {name: values[0] if len(values := given.getlist(name)) == 1 else values for name in given}
    try:
        return kind.model_validate(query)
    except ValidationError as error:
        raise _invalid("query", error) from None


def _invalid(part: str, error: ValidationError) -> InvalidBodyError:
    return InvalidBodyError(
        [
            {"loc": [part, *one["loc"]], "msg": one["msg"], "type": one["type"]}
            for one in error.errors(include_url=False, include_context=False, include_input=False)
        ]
    )


def place_of(path: str) -> list[str | int]:
    """Where in a body the field of a violation is, such as `requests[1].spec.width`."""
    words: list[str | int] = ["body"]
    for name, index in re.findall(r"(\w+)(?:\[(\d+)\])?", path):
        if name != "spec":
            words.append(_NAMES.get(name, name))
        if index:
            words.append(int(index))
    return words


def submitted(job: job_pb2.Job) -> dict[str, Any]:
    """The answer to a task that was accepted."""
    return {
        "task_id": job.job_id,
        "status": _WORDS[job.state],
        "estimated_time": _estimated_seconds(job),
        "message": _message(job),
    }


def task(job: job_pb2.Job, image_urls: Sequence[str]) -> dict[str, Any]:
    """A task as it is now.

    Args:
        job: the task.
        image_urls: of its images, in their order.
    """
    is_completed = job.state == job_pb2.JOB_STATE_SUCCEEDED
    return {
        "task_id": job.job_id,
        "status": _WORDS[job.state],
        "progress": _progress_percent(job),
        "estimated_time": _estimated_seconds(job),
        # A program that finds them takes the task for completed.
        "result_urls": list(image_urls) if is_completed else [],
        "processing_time": _processing_seconds(job),
        "created_at": _time(job.create_time),
        "completed_at": _time(job.end_time) if job.HasField("end_time") else None,
        "message": _message(job),
    }


def _progress_percent(job: job_pb2.Job) -> int:
    if job.state == job_pb2.JOB_STATE_SUCCEEDED:
        return 100
    if not job.progress.total_steps:
        return 0
    # After the last step the images are decoded.
    return min(99, 100 * job.progress.step // job.progress.total_steps)


def _estimated_seconds(job: job_pb2.Job) -> int | None:
    """The time until the images are there; None where the server cannot tell, or they will not be."""
    if job.state == job_pb2.JOB_STATE_SUCCEEDED:
        return 0
    if not job.HasField("estimated_remaining"):
        return None
    seconds: float = job.estimated_remaining.ToTimedelta().total_seconds()
    return math.ceil(seconds)


def _processing_seconds(job: job_pb2.Job) -> float | None:
    if not (job.HasField("start_time") and job.HasField("end_time")):
        return None
    return (job.end_time.ToDatetime() - job.start_time.ToDatetime()).total_seconds()


def _time(time: Timestamp) -> str:
    return time.ToDatetime(tzinfo=UTC).isoformat()


def _message(job: job_pb2.Job) -> str:
    match job.state:
        case job_pb2.JOB_STATE_QUEUED:
            return f"waits at position {job.queue_position}" if job.queue_position else "waits"
        case job_pb2.JOB_STATE_RUNNING:
            stage = job_pb2.JobStage.Name(job.stage).removeprefix("JOB_STAGE_").lower()
            return f"step {job.progress.step} of {job.spec.num_inference_steps}, {stage}"
        case job_pb2.JOB_STATE_SUCCEEDED:
            return f"{len(job.images)} images are there" if len(job.images) > 1 else "the image is there"
        case _:
            text: str = job.error.message
            return text
