"""Jobs that are submitted, looked at, watched, cancelled, deleted and downloaded apart from one another."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from hidream.v1 import image_gen_pb2, image_gen_pb2_grpc, image_pb2, job_pb2
from tests.live_server import LiveServer, running_server, wait_until
from tests.streams import follow, request

LONG_STEPS = 150
MAX_QUEUED_JOBS = 4
WAIT_SECONDS = 60.0

Stub = image_gen_pb2_grpc.ImageGenStub


@pytest.fixture(scope="module")
def narrow_server() -> Iterator[LiveServer]:
    """A server that draws one job at a time, and lets four wait."""
    flags = ("--max-running-jobs", "1", "--max-queued-jobs", str(MAX_QUEUED_JOBS), "--grace-seconds", "1")
    with running_server(*flags) as server:
        yield server


@pytest.fixture
def narrow(narrow_server: LiveServer) -> Iterator[Stub]:
    """A stub of the narrow server; no job is left when the test is over."""
    with narrow_server.stub() as stub:
        yield stub
        for job in stub.ListJobs(image_gen_pb2.ListJobsRequest()).jobs:
            stub.CancelJob(image_gen_pb2.CancelJobRequest(job_id=job.job_id))
    narrow_server.wait_until_idle()


def submission(
    request_id: str = "", labels: dict[str, str] | None = None, **spec: Any
) -> image_gen_pb2.SubmitJobRequest:
    """A job of 64×64 and two steps, unless spec says otherwise."""
    fields = {"width": 64, "height": 64, "seed": 0, "num_inference_steps": 2, **spec}
    return image_gen_pb2.SubmitJobRequest(
        spec=image_pb2.ImageSpec(prompt="a red circle", **fields), request_id=request_id, labels=labels or {}
    )


def long_job(stub: Stub, **what: Any) -> str:
    """Submit a job that outlives the test, and wait until it is drawn."""
    job_id = stub.SubmitJob(submission(num_inference_steps=LONG_STEPS, width=256, height=256, **what)).job_id
    for response in watch(stub, job_id):
        if response.event.HasField("progress"):
            break
    return job_id


def get(stub: Stub, job_id: str) -> job_pb2.Job:
    return stub.GetJob(image_gen_pb2.GetJobRequest(job_id=job_id))


def watch(stub: Stub, job_id: str, after_sequence: int = 0) -> Iterator[image_gen_pb2.WatchJobResponse]:
    return stub.WatchJob(image_gen_pb2.WatchJobRequest(job_id=job_id, after_sequence=after_sequence))


def drawn(stub: Stub, **what: Any) -> job_pb2.Job:
    """Submit a job and wait for its end."""
    job_id = stub.SubmitJob(submission(**what)).job_id
    for _ in watch(stub, job_id):
        pass
    return get(stub, job_id)


def refused(error: grpc.RpcError, code: grpc.StatusCode, *messages: Any) -> tuple[Any, ...]:
    """The details of an error, which has this code and details of these types."""
    assert error.code() == code, error.details()
    status = rpc_status.from_call(error)
    assert status is not None
    for packed, message in zip(status.details, messages, strict=True):
        assert packed.Unpack(message)
    return messages


def test_a_submitted_job_has_every_field_decided_and_ends_with_its_image(stub: Stub) -> None:
    job = stub.SubmitJob(
        image_gen_pb2.SubmitJobRequest(spec=image_pb2.ImageSpec(prompt="a red circle"), labels={"team": "x"})
    )
    assert job.state == job_pb2.JOB_STATE_QUEUED
    for field in ("width", "height", "num_inference_steps", "guidance_scale", "num_images", "seed"):
        assert job.spec.HasField(field)  # type: ignore[arg-type]
    for _ in watch(stub, job.job_id):
        pass
    ended = get(stub, job.job_id)
    assert (ended.state, ended.spec, ended.labels["team"]) == (job_pb2.JOB_STATE_SUCCEEDED, job.spec, "x")
    assert ended.execution.attempt == 1
    assert ended.start_time.ToNanoseconds() <= ended.end_time.ToNanoseconds()
    assert len(ended.images) == 1


def test_a_job_that_is_watched_tells_what_generate_tells(stub: Stub) -> None:
    message = request(width=64, height=64, num_inference_steps=2, request_id="told-by-both", detached=True)
    generated = follow(stub.Generate(message))
    watched = [response.event for response in watch(stub, generated.job.job_id)]
    kept = [event for event in generated.events if event.WhichOneof("event") not in ("queued", "progress")]
    assert watched == kept


def test_a_watcher_that_comes_back_gets_no_byte_twice_and_misses_none(stub: Stub) -> None:
    job = drawn(stub, num_images=3, seed=5)
    events = [response.event for response in watch(stub, job.job_id)]
    assert sum(event.HasField("image_chunk") for event in events) >= 2
    for number, event in enumerate(events):
        rest = [response.event for response in watch(stub, job.job_id, event.sequence)]
        assert rest == events[number + 1 :]


def test_a_request_id_stands_for_one_job_in_every_call(stub: Stub) -> None:
    job = drawn(stub, request_id="mine")
    assert stub.SubmitJob(submission("mine")).job_id == job.job_id
    with pytest.raises(grpc.RpcError) as caught:
        stub.SubmitJob(submission("mine", seed=8))
    (resource,) = refused(caught.value, grpc.StatusCode.ALREADY_EXISTS, error_details_pb2.ResourceInfo())
    assert resource.resource_name


def test_a_batch_is_accepted_whole_and_in_order_or_not_at_all(narrow: Stub) -> None:
    long_job(narrow)
    requests = [submission(f"b{number}") for number in range(MAX_QUEUED_JOBS)]
    too_many = [*requests, submission("one too many")]
    num_jobs = len(narrow.ListJobs(image_gen_pb2.ListJobsRequest()).jobs)
    wrong = [submission(), submission(width=65, num_inference_steps=0)]
    with pytest.raises(grpc.RpcError) as caught:
        narrow.BatchSubmitJobs(image_gen_pb2.BatchSubmitJobsRequest(requests=wrong))
    (bad,) = refused(caught.value, grpc.StatusCode.INVALID_ARGUMENT, error_details_pb2.BadRequest())
    assert {violation.field for violation in bad.field_violations} == {
        "requests[1].spec.width",
        "requests[1].spec.num_inference_steps",
    }
    with pytest.raises(grpc.RpcError) as caught:
        narrow.BatchSubmitJobs(image_gen_pb2.BatchSubmitJobsRequest(requests=too_many))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert len(narrow.ListJobs(image_gen_pb2.ListJobsRequest()).jobs) == num_jobs
    jobs = narrow.BatchSubmitJobs(image_gen_pb2.BatchSubmitJobsRequest(requests=requests)).jobs
    assert [job.request_id for job in jobs] == [message.request_id for message in requests]
    assert [job.queue_position for job in jobs] == [1, 2, 3, 4]
    with pytest.raises(grpc.RpcError) as caught:
        narrow.BatchSubmitJobs(image_gen_pb2.BatchSubmitJobsRequest(requests=[submission("late")]))
    refused(
        caught.value,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        error_details_pb2.QuotaFailure(),
        error_details_pb2.RetryInfo(),
    )


def test_pages_hold_each_job_once_newest_first_whatever_is_added_meanwhile(stub: Stub) -> None:
    label = {"listing": "pages"}
    jobs = [drawn(stub, labels=label, num_inference_steps=1) for _ in range(5)]
    seen: list[str] = []
    token = ""
    while True:
        page = stub.ListJobs(image_gen_pb2.ListJobsRequest(page_size=2, page_token=token, labels=label))
        seen += [job.job_id for job in page.jobs]
        token = page.next_page_token
        if not token:
            break
        drawn(stub, labels=label, num_inference_steps=1)
    assert seen == [job.job_id for job in reversed(jobs)]
    running = image_gen_pb2.ListJobsRequest(labels=label, states=[job_pb2.JOB_STATE_RUNNING])
    assert not stub.ListJobs(running).jobs
    with pytest.raises(grpc.RpcError) as caught:
        stub.ListJobs(image_gen_pb2.ListJobsRequest(page_token="none of ours", labels=label))
    (bad,) = refused(caught.value, grpc.StatusCode.INVALID_ARGUMENT, error_details_pb2.BadRequest())
    assert bad.field_violations[0].field == "page_token"


def test_cancelling_stops_waiting_and_running_jobs_and_watchers_end_well(narrow: Stub) -> None:
    running = long_job(narrow)
    waiting = narrow.SubmitJob(submission()).job_id
    watches = [watch(narrow, job_id) for job_id in (running, waiting)]
    cancelled = narrow.CancelJob(image_gen_pb2.CancelJobRequest(job_id=waiting))
    assert cancelled.state == job_pb2.JOB_STATE_CANCELLED
    narrow.CancelJob(image_gen_pb2.CancelJobRequest(job_id=running))
    for call in watches:
        last = [response.event for response in call][-1]
        assert last.cancelled.reason == job_pb2.CANCEL_REASON_REQUESTED
    again = narrow.CancelJob(image_gen_pb2.CancelJobRequest(job_id=running))
    assert again.state == job_pb2.JOB_STATE_CANCELLED


def test_deleting_takes_a_job_that_has_ended_and_its_images(narrow: Stub) -> None:
    running = long_job(narrow)
    with pytest.raises(grpc.RpcError) as caught:
        narrow.DeleteJob(image_gen_pb2.DeleteJobRequest(job_id=running))
    refused(
        caught.value,
        grpc.StatusCode.FAILED_PRECONDITION,
        error_details_pb2.PreconditionFailure(),
        error_details_pb2.ResourceInfo(),
    )
    narrow.CancelJob(image_gen_pb2.CancelJobRequest(job_id=running))
    job = drawn(narrow)
    narrow.DeleteJob(image_gen_pb2.DeleteJobRequest(job_id=job.job_id))
    for call in (
        lambda: get(narrow, job.job_id),
        lambda: list(watch(narrow, job.job_id)),
        lambda: list(narrow.DownloadImage(image_gen_pb2.DownloadImageRequest(job_id=job.job_id))),
        lambda: narrow.CancelJob(image_gen_pb2.CancelJobRequest(job_id=job.job_id)),
        lambda: narrow.DeleteJob(image_gen_pb2.DeleteJobRequest(job_id=job.job_id)),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            call()
        refused(caught.value, grpc.StatusCode.NOT_FOUND, error_details_pb2.ResourceInfo())


def test_a_download_goes_on_from_any_offset(narrow: Stub) -> None:
    job = drawn(narrow, width=512, height=512)
    (image,) = job.images

    def download(offset: int, index: int = 0, job_id: str = job.job_id) -> bytes:
        message = image_gen_pb2.DownloadImageRequest(job_id=job_id, image_index=index, offset=offset)
        return b"".join(response.chunk.data for response in narrow.DownloadImage(message))

    whole = download(0)
    assert hashlib.sha256(whole).digest() == image.sha256
    for offset in (1, image.size_bytes // 2, image.size_bytes - 1, image.size_bytes):
        assert download(offset) == whole[offset:]
    running = long_job(narrow)
    for code, call in (
        (grpc.StatusCode.OUT_OF_RANGE, lambda: download(image.size_bytes + 1)),
        (grpc.StatusCode.NOT_FOUND, lambda: download(0, index=1)),
        (grpc.StatusCode.FAILED_PRECONDITION, lambda: download(0, job_id=running)),
        (grpc.StatusCode.INVALID_ARGUMENT, lambda: download(-1)),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            call()
        assert caught.value.code() == code


def test_one_stream_tells_the_states_of_all_jobs_that_carry_a_label(stub: Stub) -> None:
    label = {"watched": "many"}
    before = drawn(stub, labels=label)
    changes = stub.WatchJobs(image_gen_pb2.WatchJobsRequest(labels=label))
    assert next(changes).job.job_id == before.job_id
    drawn(stub)
    after = drawn(stub, labels=label, num_inference_steps=20)
    states: list[job_pb2.JobState.ValueType] = []
    for change in changes:
        assert change.job.job_id == after.job_id
        states.append(change.job.state)
        if change.job.state == job_pb2.JOB_STATE_SUCCEEDED:
            break
    changes.cancel()
    assert states == [job_pb2.JOB_STATE_QUEUED, job_pb2.JOB_STATE_RUNNING, job_pb2.JOB_STATE_SUCCEEDED]


def test_what_waits_at_sigterm_is_drawn_after_the_next_start(tmp_path: Path) -> None:
    flags = ("--max-running-jobs", "1", "--grace-seconds", "60", "--data-dir", str(tmp_path))
    with running_server(*flags) as server, server.stub() as stub:
        running, waiting = [
            stub.SubmitJob(submission(num_inference_steps=80, seed=seed)).job_id for seed in (1, 2)
        ]
        wait_until(
            lambda: get(stub, running).state == job_pb2.JOB_STATE_RUNNING, WAIT_SECONDS, "the job runs"
        )
        server.process.terminate()
        assert server.process.wait(WAIT_SECONDS) == 0
    with running_server(*flags) as server, server.stub() as stub:
        assert get(stub, running).state == job_pb2.JOB_STATE_SUCCEEDED
        events = [response.event for response in watch(stub, waiting)]
        assert events[-1].HasField("succeeded")
