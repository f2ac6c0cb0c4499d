"""Jobs that are submitted, looked at, cancelled and deleted apart from one another."""

from __future__ import annotations

import random
import time
from typing import Any

import grpc
import pytest
from google.rpc import code_pb2, error_details_pb2

from hidream.v1 import image_gen_pb2, image_pb2, job_pb2
from tests.e2e.conftest import NarrowServer
from tests.support.job_calls import (
    LONG_STEPS,
    WAIT_SECONDS,
    Stub,
    bad_fields,
    calls_about,
    cancel,
    delete,
    drawn,
    events,
    get,
    listed,
    not_found,
    refusal,
    running,
    submission,
    submit,
    submit_batch,
    wait_for_state,
)
from tests.support.live_server import LiveServer, wait_until
from tests.support.streams import follow

CALLS_ABOUT_A_JOB = ("GetJob", "WatchJob", "CancelJob", "DeleteJob", "DownloadImage")


def seconds(duration: Any) -> float:
    return float(duration.ToTimedelta().total_seconds())


def test_a_submitted_job_has_every_field_decided_as_server_info_says(stub: Stub, server: LiveServer) -> None:
    info = server.info()
    job = stub.SubmitJob(image_gen_pb2.SubmitJobRequest(spec=image_pb2.ImageSpec(prompt="a red circle")))
    cancel(stub, job.job_id)
    assert job.job_id
    assert job.request_id
    assert job.state == job_pb2.JOB_STATE_QUEUED
    spec, defaults = job.spec, info.defaults
    assert (spec.prompt, spec.output_format) == ("a red circle", image_pb2.OUTPUT_FORMAT_PNG)
    for field in ("width", "height", "num_inference_steps", "guidance_scale", "num_images"):
        assert spec.HasField(field)  # type: ignore[arg-type]
        assert getattr(spec, field) == getattr(defaults, field)
    assert spec.HasField("seed")
    assert 0 <= spec.seed <= info.limits.max_seed
    assert job.priority == job_pb2.PRIORITY_NORMAL
    assert job.create_time.ToNanoseconds() > info.start_time.ToNanoseconds()
    for field in ("execution", "progress", "error", "start_time", "end_time"):
        assert not job.HasField(field)  # type: ignore[arg-type]
    assert not job.images


def test_what_a_submission_says_is_what_its_job_says(stub: Stub) -> None:
    message = submission(
        "what-it-says",
        {"team": "x", "stage": ""},
        priority=job_pb2.PRIORITY_HIGH,
        negative_prompt="blue",
        width=96,
        height=64,
        guidance_scale=3.5,
        num_images=2,
        seed=77,
        output_format=image_pb2.OUTPUT_FORMAT_WEBP,
        quality=40,
    )
    job = stub.SubmitJob(message)
    assert (job.spec, job.request_id, job.priority) == (message.spec, "what-it-says", message.priority)
    assert job.labels == message.labels
    (*_, last) = events(stub, job.job_id)
    ended = get(stub, job.job_id)
    assert last.succeeded.job == ended
    assert (ended.spec, ended.labels, ended.priority) == (job.spec, job.labels, job.priority)
    assert [(image.index, image.seed, image.width, image.height) for image in ended.images] == [
        (0, 77, 96, 64),
        (1, 78, 96, 64),
    ]
    assert {image.mime_type for image in ended.images} == {"image/webp"}


def test_a_job_that_has_ended_says_how_and_when_it_was_drawn(stub: Stub, server: LiveServer) -> None:
    info = server.info()
    job = drawn(stub, num_inference_steps=3)
    assert (job.state, job.stage) == (job_pb2.JOB_STATE_SUCCEEDED, job_pb2.JOB_STAGE_UNSPECIFIED)
    execution = job.execution
    assert (execution.model, execution.scheduler) == (info.model.name, info.model.scheduler)
    assert (execution.shift, execution.layout, execution.attempt) == (info.model.shift, info.layout, 1)
    assert (job.progress.step, job.progress.total_steps) == (3, 3)
    assert seconds(job.progress.step_duration) > 0
    created, started, ended = (time.ToDatetime() for time in (job.create_time, job.start_time, job.end_time))
    assert created <= started <= ended
    timings = job.timings
    for spent in (timings.queue, timings.encode, timings.denoise, timings.decode, timings.total):
        assert seconds(spent) > 0
    # Times are told in microseconds.
    assert seconds(timings.queue) == pytest.approx((started - created).total_seconds(), abs=1e-5)
    assert seconds(timings.total) == pytest.approx((ended - created).total_seconds(), abs=1e-5)
    assert seconds(timings.denoise) >= seconds(job.progress.step_duration)
    assert seconds(timings.queue) + seconds(timings.denoise) < seconds(timings.total)
    (image,) = job.images
    assert (image.index, image.seed, image.mime_type, len(image.sha256)) == (0, 0, "image/png", 32)
    assert image.size_bytes > 0
    assert not job.HasField("error")
    assert not job.HasField("estimated_wait")
    assert not job.HasField("estimated_remaining")
    assert job.queue_position == 0


def test_a_running_job_says_how_far_it_is_and_how_long_it_will_take(narrow: Stub) -> None:
    job = get(narrow, running(narrow))
    assert (job.state, job.stage) == (job_pb2.JOB_STATE_RUNNING, job_pb2.JOB_STAGE_DENOISING)
    assert 1 <= job.progress.step < LONG_STEPS
    assert job.progress.total_steps == LONG_STEPS
    assert seconds(job.progress.step_duration) > 0
    assert seconds(job.progress.estimated_remaining) > 0
    assert job.estimated_remaining == job.progress.estimated_remaining
    assert job.execution.attempt == 1
    assert job.HasField("start_time")
    assert seconds(job.timings.queue) > 0
    assert seconds(job.timings.encode) > 0
    assert not job.HasField("end_time")
    assert not job.HasField("estimated_wait")
    assert (job.queue_position, len(job.images)) == (0, 0)


def test_jobs_that_wait_say_their_place_and_for_how_long(narrow: Stub) -> None:
    # One of a lower priority would not keep those of this one waiting.
    ahead = running(narrow, priority=job_pb2.PRIORITY_HIGH)
    jobs = [submit(narrow, seed=seed) for seed in (1, 2)]
    urgent = submit(narrow, priority=job_pb2.PRIORITY_HIGH)
    assert [job.queue_position for job in (*jobs, urgent)] == [1, 2, 1]
    shown = [get(narrow, job.job_id) for job in (urgent, *jobs)]
    assert [job.queue_position for job in shown] == [1, 2, 3]
    for job in shown:
        assert 0 < seconds(job.estimated_wait) < seconds(job.estimated_remaining)
        assert (job.state, job.stage) == (job_pb2.JOB_STATE_QUEUED, job_pb2.JOB_STAGE_UNSPECIFIED)
        assert not job.HasField("execution")
        assert not job.HasField("start_time")
    # The list says the same, and its estimates are all of one moment.
    in_list = {job.job_id: job for job in narrow.ListJobs(image_gen_pb2.ListJobsRequest()).jobs}
    assert [in_list[job.job_id].queue_position for job in shown] == [1, 2, 3]
    waits = [seconds(in_list[job.job_id].estimated_wait) for job in shown]
    assert waits == sorted(waits)
    assert in_list[ahead].queue_position == 0
    cancel(narrow, urgent.job_id)
    wait_until(
        lambda: [get(narrow, job.job_id).queue_position for job in jobs] == [1, 2],
        WAIT_SECONDS,
        "those behind have moved up",
    )


@pytest.mark.parametrize("call", CALLS_ABOUT_A_JOB)
def test_a_job_that_is_not_there_is_not_found_by_name(stub: Stub, call: str) -> None:
    unknown = "0123456789abcdef" * 2
    assert not_found(calls_about(stub, unknown)[call]).resource_name == unknown
    # What no job can be called, and no header or database can hold, is no job either.
    for impossible in ("a\0b", "j" * 100_000, "☃" * 3000, "two words"):
        assert len(not_found(calls_about(stub, impossible)[call]).resource_name) < 500


@pytest.mark.parametrize("call", CALLS_ABOUT_A_JOB)
def test_a_call_about_no_job_names_the_field_that_is_missing(stub: Stub, call: str) -> None:
    assert bad_fields(calls_about(stub, "")[call]) == {"job_id": "is required"}


def test_numbers_below_zero_are_named_all_at_once(stub: Stub) -> None:
    watch = image_gen_pb2.WatchJobRequest(after_sequence=-1)
    assert set(bad_fields(lambda: list(stub.WatchJob(watch)))) == {"job_id", "after_sequence"}
    download = image_gen_pb2.DownloadImageRequest(image_index=-1, offset=-1)
    told = bad_fields(lambda: list(stub.DownloadImage(download)))
    assert set(told) == {"job_id", "image_index", "offset"}


def test_a_cancelled_job_that_waited_is_never_started(narrow: Stub) -> None:
    ahead = running(narrow)
    waiting = submit(narrow)
    cancelled = cancel(narrow, waiting.job_id)
    assert cancelled.state == job_pb2.JOB_STATE_CANCELLED
    assert cancelled.error.code == code_pb2.CANCELLED
    assert cancelled.HasField("end_time")
    assert cancelled.queue_position == 0
    cancel(narrow, ahead)
    drawn(narrow)
    ended = get(narrow, waiting.job_id)
    assert ended == cancelled
    assert not ended.HasField("start_time")
    assert not ended.HasField("execution")
    # Cancelling it again changes nothing.
    assert cancel(narrow, waiting.job_id) == ended


def test_a_cancelled_job_that_ran_makes_room_for_the_next(narrow: Stub) -> None:
    ahead = running(narrow)
    behind = submit(narrow)
    assert cancel(narrow, ahead).state in (job_pb2.JOB_STATE_RUNNING, job_pb2.JOB_STATE_CANCELLED)
    wait_for_state(narrow, behind.job_id, job_pb2.JOB_STATE_SUCCEEDED)
    stopped = get(narrow, ahead)
    assert (stopped.state, stopped.error.code) == (job_pb2.JOB_STATE_CANCELLED, code_pb2.CANCELLED)
    assert stopped.stage == job_pb2.JOB_STAGE_UNSPECIFIED
    assert 1 <= stopped.progress.step < LONG_STEPS
    assert not stopped.images


def test_cancelling_a_job_that_has_ended_changes_nothing(stub: Stub) -> None:
    job = drawn(stub)
    assert cancel(stub, job.job_id) == job
    assert get(stub, job.job_id) == job


def test_deleting_a_job_takes_its_images_and_all_that_was_known_of_it(
    narrow: Stub, narrow_server: NarrowServer
) -> None:
    kept, job = drawn(narrow, labels={"delete": "one"}), drawn(narrow, num_images=2, labels={"delete": "one"})
    assert len(narrow_server.files_of(job.job_id)) == 2
    delete(narrow, job.job_id)
    assert not narrow_server.files_of(job.job_id)
    for call in calls_about(narrow, job.job_id).values():
        not_found(call)
    assert listed(narrow, labels={"delete": "one"}) == [kept.job_id]
    assert len(narrow_server.files_of(kept.job_id)) == 1


def test_a_job_that_has_not_ended_is_not_deleted(narrow: Stub) -> None:
    jobs = running(narrow), submit(narrow).job_id
    for job_id in jobs:
        failure, resource = refusal(
            lambda job_id=job_id: delete(narrow, job_id),  # type: ignore[misc]
            grpc.StatusCode.FAILED_PRECONDITION,
            error_details_pb2.PreconditionFailure(),
            error_details_pb2.ResourceInfo(),
        )
        assert failure.violations[0].subject == resource.resource_name == job_id
    assert [get(narrow, job_id).state for job_id in jobs] == [
        job_pb2.JOB_STATE_RUNNING,
        job_pb2.JOB_STATE_QUEUED,
    ]


def test_a_request_id_stands_for_one_job_in_every_call(stub: Stub, server: LiveServer) -> None:
    message = submission("one-in-all", labels={"a": "b"}, num_inference_steps=3)
    job_id = stub.SubmitJob(message).job_id
    total = server.info().jobs.total
    assert stub.SubmitJob(message).job_id == job_id
    assert [job.job_id for job in submit_batch(stub, message)] == [job_id]
    generate = image_gen_pb2.GenerateRequest(
        spec=message.spec, request_id=message.request_id, labels=message.labels, detached=True
    )
    stream = follow(stub.Generate(generate))
    assert {response.job_id for response in stream.responses} == {job_id}
    # It has ended, and is not drawn again.
    assert stub.SubmitJob(message) == get(stub, job_id) == stream.job
    assert server.info().jobs.total == total


def test_a_job_that_generate_began_is_found_by_its_request_id_too(stub: Stub) -> None:
    message = submission("generate-first")
    generate = image_gen_pb2.GenerateRequest(spec=message.spec, request_id="generate-first", detached=True)
    stream = follow(stub.Generate(generate))
    assert stub.SubmitJob(message) == stream.job


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 1},
        {"prompt": "a blue circle"},
        {"num_inference_steps": 1},
        {"labels": {"a": "b"}},
        {"preview": True},
        {"priority": job_pb2.PRIORITY_LOW},
    ],
    ids=["seed", "prompt", "steps", "labels", "preview", "priority"],
)
def test_a_request_id_with_another_content_is_refused_with_the_job_that_has_it(
    stub: Stub, other: dict[str, Any]
) -> None:
    job = submit(stub, request_id="has-a-job")
    generate = image_gen_pb2.GenerateRequest(spec=submission(seed=9).spec, request_id="has-a-job")
    for call in (
        lambda: submit(stub, request_id="has-a-job", **other),
        lambda: submit_batch(stub, submission("has-a-job", **other)),
        lambda: follow(stub.Generate(generate)),
    ):
        (resource,) = refusal(call, grpc.StatusCode.ALREADY_EXISTS, error_details_pb2.ResourceInfo())
        assert resource.resource_name == job.job_id
    assert get(stub, job.job_id).spec == job.spec


def test_a_request_without_a_seed_draws_the_same_when_it_is_tried_again(stub: Stub) -> None:
    message = submission("seedless")
    message.spec.ClearField("seed")
    first = stub.SubmitJob(message)
    again = stub.SubmitJob(message)
    assert (again.job_id, again.spec) == (first.job_id, first.spec)
    other = submission("another")
    other.spec.ClearField("seed")
    assert stub.SubmitJob(other).spec.seed != first.spec.seed


def test_a_job_that_was_cancelled_or_deleted_gives_its_request_id_free(narrow: Stub) -> None:
    message = submission("free-again", num_inference_steps=LONG_STEPS)
    first = narrow.SubmitJob(message)
    wait_for_state(narrow, first.job_id, job_pb2.JOB_STATE_RUNNING)
    cancel(narrow, first.job_id)
    # Also while the first one has not quite stopped.
    second = narrow.SubmitJob(message)
    assert second.job_id != first.job_id
    cancel(narrow, second.job_id)
    wait_for_state(narrow, second.job_id, job_pb2.JOB_STATE_CANCELLED)
    third = drawn(narrow, request_id="free-again", seed=3)
    assert third.job_id not in (first.job_id, second.job_id)
    assert get(narrow, first.job_id).state == job_pb2.JOB_STATE_CANCELLED
    delete(narrow, third.job_id)
    assert drawn(narrow, request_id="free-again", seed=4).state == job_pb2.JOB_STATE_SUCCEEDED


def test_callers_that_vanish_while_they_submit_hold_up_nobody(stub: Stub, server: LiveServer) -> None:
    generator = random.Random(6)
    for number in range(60):
        call: Any = stub.SubmitJob.future(submission(f"vanishes-{number}", num_inference_steps=1))  # type: ignore[attr-defined]
        time.sleep(generator.uniform(0.0, 0.01))
        call.cancel()
    # Whether it was accepted or not, it is one job that can be asked for again.
    first, *others = [submit(stub, request_id="vanishes-0", num_inference_steps=1).job_id for _ in range(3)]
    assert others == [first, first]
    assert events(stub, first)[-1].HasField("succeeded")
    assert "does not answer" not in server.log
