"""Calls about jobs through plain generated stubs, and what came of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from hidream.v1 import image_gen_pb2, image_gen_pb2_grpc, image_pb2, job_pb2
from tests.support.live_server import wait_until

LONG_STEPS = 150
WAIT_SECONDS = 60.0
DEADLINES_SECONDS = (0.5, 4.0, 32.0)
"""Deadlines that shall pass while a job runs, not before it is accepted: the first that does so."""

Stub = image_gen_pb2_grpc.ImageGenStub


def submission(
    request_id: str = "",
    labels: dict[str, str] | None = None,
    preview: bool = False,
    priority: job_pb2.Priority.ValueType = job_pb2.PRIORITY_UNSPECIFIED,
    **spec: Any,
) -> image_gen_pb2.SubmitJobRequest:
    """A job of 64×64 and two steps, unless spec says otherwise."""
    fields = {"prompt": "a red circle", "width": 64, "height": 64, "seed": 0, "num_inference_steps": 2}
    return image_gen_pb2.SubmitJobRequest(
        spec=image_pb2.ImageSpec(**{**fields, **spec}),
        request_id=request_id,
        labels=labels or {},
        preview=preview,
        priority=priority,
    )


def submit(stub: Stub, **what: Any) -> job_pb2.Job:
    return stub.SubmitJob(submission(**what))


def is_accepted(stub: Stub) -> bool:
    """Whether a job of one step is accepted now; it must be UNAVAILABLE otherwise."""
    try:
        submit(stub, num_inference_steps=1)
    except grpc.RpcError as error:
        assert isinstance(error, grpc.Call)
        assert error.code() == grpc.StatusCode.UNAVAILABLE
        return False
    return True


def submit_batch(stub: Stub, *requests: image_gen_pb2.SubmitJobRequest) -> list[job_pb2.Job]:
    return list(stub.BatchSubmitJobs(image_gen_pb2.BatchSubmitJobsRequest(requests=requests)).jobs)


def drawn(stub: Stub, **what: Any) -> job_pb2.Job:
    """Submit a job; the job as it is when it has ended."""
    job_id = submit(stub, **what).job_id
    events(stub, job_id)
    return get(stub, job_id)


def running(stub: Stub, **what: Any) -> str:
    """Submit a job that outlives the test, and wait until it has taken a step; returns its id."""
    job_id = submit(stub, **{"num_inference_steps": LONG_STEPS, "width": 256, "height": 256, **what}).job_id
    for response in watch(stub, job_id):
        if response.event.HasField("progress"):
            return job_id
    raise AssertionError(f"job {job_id} has ended")


def get(stub: Stub, job_id: str) -> job_pb2.Job:
    return stub.GetJob(image_gen_pb2.GetJobRequest(job_id=job_id))


def cancel(stub: Stub, job_id: str) -> job_pb2.Job:
    return stub.CancelJob(image_gen_pb2.CancelJobRequest(job_id=job_id))


def delete(stub: Stub, job_id: str) -> None:
    stub.DeleteJob(image_gen_pb2.DeleteJobRequest(job_id=job_id))


def listed(stub: Stub, **query: Any) -> list[str]:
    """The ids of one page of jobs."""
    return [job.job_id for job in stub.ListJobs(image_gen_pb2.ListJobsRequest(**query)).jobs]


def watch(stub: Stub, job_id: str, after_sequence: int = 0, **call: Any) -> Any:
    return stub.WatchJob(image_gen_pb2.WatchJobRequest(job_id=job_id, after_sequence=after_sequence), **call)


def events(stub: Stub, job_id: str, after_sequence: int = 0) -> list[job_pb2.JobEvent]:
    """The events of a job, to its end."""
    return [response.event for response in watch(stub, job_id, after_sequence)]


def download(stub: Stub, job_id: str, index: int = 0, offset: int = 0) -> list[image_pb2.ImageChunk]:
    """The pieces of an image from an offset."""
    message = image_gen_pb2.DownloadImageRequest(job_id=job_id, image_index=index, offset=offset)
    return [response.chunk for response in stub.DownloadImage(message)]


def downloaded(stub: Stub, job_id: str, index: int = 0, offset: int = 0) -> bytes:
    return b"".join(chunk.data for chunk in download(stub, job_id, index, offset))


def wait_for_state(stub: Stub, job_id: str, state: job_pb2.JobState.ValueType) -> None:
    name = job_pb2.JobState.Name(state)
    wait_until(lambda: get(stub, job_id).state == state, WAIT_SECONDS, f"the job is {name}")


def read_stream(call: Iterator[Any]) -> tuple[list[Any], grpc.StatusCode]:
    """All messages of a stream, and the code that it ends with."""
    messages = []
    try:
        for message in call:
            messages.append(message)
    except grpc.RpcError as error:
        assert isinstance(error, grpc.Call)
        return messages, error.code()
    return messages, grpc.StatusCode.OK


def begun(call_with: Callable[[float], Any]) -> tuple[Any, Any]:
    """A call whose deadline has not passed before its first message, and that message.

    On a busy machine a deadline may pass before the server has read the request: then the call is made again
    with more time.

    Args:
        call_with: makes the call, with a deadline in so many seconds.
    """
    for seconds in DEADLINES_SECONDS:
        call = call_with(seconds)
        try:
            return call, next(call)
        except grpc.RpcError as error:
            assert isinstance(error, grpc.Call)
            assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    raise AssertionError(f"no message within {DEADLINES_SECONDS[-1]:g} s")


def details_of(error: grpc.RpcError, code: grpc.StatusCode, *messages: Message) -> tuple[Any, ...]:
    """The details of an error, which has this code and details of these types, in their order."""
    assert isinstance(error, grpc.Call)
    assert error.code() == code, error.details()
    status = rpc_status.from_call(error)
    assert status is not None
    for packed, message in zip(status.details, messages, strict=True):
        assert packed.Unpack(message), packed.type_url
    return messages


def refusal(call: Callable[[], Any], code: grpc.StatusCode, *messages: Message) -> tuple[Any, ...]:
    """Make a call that must be refused with this code; its details, which are of these types."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return details_of(caught.value, code, *messages)


def not_found(call: Callable[[], Any]) -> error_details_pb2.ResourceInfo:
    """Make a call about what must not be there."""
    (resource,) = refusal(call, grpc.StatusCode.NOT_FOUND, error_details_pb2.ResourceInfo())
    assert resource.resource_type == "Job"
    return resource


def bad_fields(call: Callable[[], Any]) -> dict[str, str]:
    """Make a call that must be refused as INVALID_ARGUMENT; what is wrong with it, by field."""
    (bad,) = refusal(call, grpc.StatusCode.INVALID_ARGUMENT, error_details_pb2.BadRequest())
    return {violation.field: violation.description for violation in bad.field_violations}


def calls_about(stub: Stub, job_id: str, **call: Any) -> dict[str, Callable[[], Any]]:
    """Every call that names one job."""
    return {
        "GetJob": lambda: stub.GetJob(image_gen_pb2.GetJobRequest(job_id=job_id), **call),
        "WatchJob": lambda: list(stub.WatchJob(image_gen_pb2.WatchJobRequest(job_id=job_id), **call)),
        "CancelJob": lambda: stub.CancelJob(image_gen_pb2.CancelJobRequest(job_id=job_id), **call),
        "DeleteJob": lambda: stub.DeleteJob(image_gen_pb2.DeleteJobRequest(job_id=job_id), **call),
        "DownloadImage": lambda: list(
            stub.DownloadImage(image_gen_pb2.DownloadImageRequest(job_id=job_id), **call)
        ),
    }
