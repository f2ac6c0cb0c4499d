"""One job's events, from any point to its end."""

from __future__ import annotations

import hashlib
import os
import signal
from concurrent.futures import ThreadPoolExecutor

import grpc
from google.rpc import code_pb2, error_details_pb2

from hidream.v1 import image_gen_pb2, job_pb2
from tests.e2e.conftest import NarrowServer
from tests.support.job_calls import (
    LONG_STEPS,
    Stub,
    begun,
    cancel,
    delete,
    drawn,
    events,
    get,
    not_found,
    read_stream,
    refusal,
    running,
    submission,
    submit,
    wait_for_state,
    watch,
)
from tests.support.live_server import LiveServer, wait_until
from tests.support.streams import follow, is_progress, read_until, request

RUNNING, FAILED = job_pb2.JOB_STATE_RUNNING, job_pb2.JOB_STATE_FAILED


def kinds(told: list[job_pb2.JobEvent]) -> list[str]:
    return [event.WhichOneof("event") or "" for event in told]


def kept_of(told: list[job_pb2.JobEvent]) -> list[job_pb2.JobEvent]:
    """Without those that a job that has ended may tell no more."""
    return [event for event in told if event.WhichOneof("event") not in ("queued", "progress")]


def files(told: list[job_pb2.JobEvent]) -> list[bytes]:
    """The images of a stream, by index; every piece must follow the one before."""
    images: dict[int, bytes] = {}
    for event in told:
        if event.HasField("image_chunk"):
            chunk = event.image_chunk
            assert chunk.offset == len(images.get(chunk.image.index, b""))
            images[chunk.image.index] = images.get(chunk.image.index, b"") + chunk.data
    return [images[index] for index in sorted(images)]


def assert_whole(told: list[job_pb2.JobEvent], num_images: int) -> None:
    """A stream of one job from its beginning: in order, with all images, and its end."""
    sequences = [event.sequence for event in told]
    assert sequences == sorted(set(sequences))
    assert told[-1].HasField("succeeded")
    job = told[-1].succeeded.job
    images = files(told)
    assert len(images) == num_images
    assert [hashlib.sha256(data).digest() for data in images] == [image.sha256 for image in job.images]


def test_a_job_that_has_ended_tells_all_that_is_kept_of_it(narrow: Stub, narrow_server: NarrowServer) -> None:
    job = drawn(narrow, num_images=2, num_inference_steps=3, seed=5)
    responses = list(watch(narrow, job.job_id))
    assert {response.job_id for response in responses} == {job.job_id}
    told = kept_of([response.event for response in responses])
    assert_whole(told, num_images=2)
    assert told[0].started.spec == job.spec
    assert told[0].started.execution == job.execution
    assert told[0].started.queue_duration == job.timings.queue
    assert told[-1].succeeded.job == job
    assert set(kinds(told[1:-1])) == {"image_chunk"}
    assert max(len(event.image_chunk.data) for event in told) == narrow_server.chunk_bytes
    # The job began, and ended, when its events say.
    assert (told[0].time, told[-1].time) == (job.start_time, job.end_time)


def test_a_job_that_is_watched_without_images_tells_all_but_them(stub: Stub) -> None:
    job = drawn(stub, num_inference_steps=2)
    message = image_gen_pb2.WatchJobRequest(job_id=job.job_id, without_images=True)
    told = kept_of([response.event for response in stub.WatchJob(message)])
    assert told == [event for event in kept_of(events(stub, job.job_id)) if not event.HasField("image_chunk")]
    assert told[-1].succeeded.job == job


def test_a_job_that_is_watched_tells_what_generate_tells(stub: Stub) -> None:
    message = request(width=64, height=64, num_inference_steps=2, request_id="told-by-both", detached=True)
    generated = follow(stub.Generate(message))
    assert kept_of(events(stub, generated.job.job_id)) == kept_of(generated.events)


def test_a_job_is_watched_from_the_queue_to_its_images(narrow: Stub) -> None:
    ahead = running(narrow)
    first, second = [submit(narrow, seed=seed, num_inference_steps=8).job_id for seed in (1, 2)]
    call = watch(narrow, second)
    assert next(call).event.queued.queue_position == 2
    cancel(narrow, first)
    moved = next(call).event
    assert moved.queued.queue_position == 1
    assert moved.queued.HasField("estimated_wait")
    cancel(narrow, ahead)
    told = [moved, *(response.event for response in call)]
    assert_whole(told, num_images=1)
    order = list(dict.fromkeys(kinds(told)))
    assert order == ["queued", "started", "progress", "image_chunk", "succeeded"]
    steps = [event.progress.step for event in told if event.HasField("progress")]
    assert steps == sorted(set(steps))
    assert steps[-1] == 8
    times = [event.time.ToNanoseconds() for event in told]
    assert times == sorted(times)


def test_previews_are_told_where_the_submission_asked_for_them(stub: Stub, server: LiveServer) -> None:
    job_id = submit(stub, preview=True, num_inference_steps=4).job_id
    previews = [event.preview for event in events(stub, job_id) if event.HasField("preview")]
    # A reader that is slower than the steps misses older ones.
    assert previews[-1].step == 4
    assert previews[-1].mime_type == "image/jpeg"
    assert previews[-1].data


def test_a_watcher_that_comes_back_misses_no_byte_and_gets_nothing_twice(narrow: Stub) -> None:
    job = drawn(narrow, num_images=2, seed=5)
    told = kept_of(events(narrow, job.job_id))
    assert kinds(told).count("image_chunk") >= 4
    for number, event in enumerate(told):
        assert kept_of(events(narrow, job.job_id, event.sequence)) == told[number + 1 :]
    # Between two numbers, and beyond the last.
    assert kept_of(events(narrow, job.job_id, told[1].sequence - 1)) == told[1:]
    assert events(narrow, job.job_id, 2**63 - 1) == []


def test_a_watcher_that_comes_back_while_the_job_runs_goes_on_where_it_was(narrow: Stub) -> None:
    job_id = submit(narrow, num_inference_steps=20, num_images=2).job_id
    told: list[job_pb2.JobEvent] = []
    while not told or not told[-1].HasField("succeeded"):
        call = watch(narrow, job_id, told[-1].sequence if told else 0)
        # Three events, and away: in the queue, between the steps, in the middle of an image.
        for response, _ in zip(call, range(3), strict=False):
            told.append(response.event)
        call.cancel()
    assert_whole(told, num_images=2)
    steps = [event.progress.step for event in told if event.HasField("progress")]
    assert steps == sorted(set(steps))


def test_several_watchers_are_told_the_same_images_and_end(narrow: Stub) -> None:
    ahead = running(narrow)
    job_id = submit(narrow, num_images=3).job_id
    calls = [watch(narrow, job_id) for _ in range(4)]
    for call in calls:
        assert next(call).event.HasField("queued")
    cancel(narrow, ahead)
    with ThreadPoolExecutor() as threads:
        streams = list(threads.map(lambda call: [response.event for response in call], calls))
    for told in streams:
        assert_whole(told, num_images=3)
    ends = [[event for event in told if event.HasField("image_chunk")] + told[-1:] for told in streams]
    assert ends == [ends[0]] * 4


def test_closing_a_watch_does_not_touch_the_job(narrow: Stub) -> None:
    job_id = running(narrow)
    call = watch(narrow, job_id)
    step = read_until(call, is_progress)[-1].event.progress.step
    call.cancel()
    assert any(response.event.progress.step > step for response in watch(narrow, job_id))
    assert get(narrow, job_id).state == RUNNING


def test_a_deadline_ends_a_watch_and_not_the_job(narrow: Stub) -> None:
    job_id = running(narrow, width=512, height=512)
    call, _ = begun(lambda seconds: watch(narrow, job_id, timeout=seconds))
    assert read_stream(call)[1] == grpc.StatusCode.DEADLINE_EXCEEDED
    assert get(narrow, job_id).state == RUNNING


def test_a_cancelled_job_is_the_last_event_and_the_stream_ends_well(narrow: Stub) -> None:
    ahead = running(narrow)
    waiting = submit(narrow).job_id
    calls = {job_id: watch(narrow, job_id) for job_id in (ahead, waiting)}
    for job_id in (waiting, ahead):
        cancel(narrow, job_id)
        responses, code = read_stream(calls[job_id])
        assert code == grpc.StatusCode.OK
        last = responses[-1].event
        assert last.cancelled.reason == job_pb2.CANCEL_REASON_REQUESTED
        # So it is for who comes later.
        assert events(narrow, job_id)[-1] == last
    assert kinds(kept_of(events(narrow, waiting))) == ["cancelled"]


def test_who_watches_does_not_keep_the_job_of_a_caller_that_leaves(narrow: Stub) -> None:
    call = narrow.Generate(request(num_inference_steps=LONG_STEPS))
    job_id = read_until(call, is_progress)[-1].job_id
    watcher = watch(narrow, job_id)
    next(watcher)
    call.cancel()
    responses, code = read_stream(watcher)
    assert code == grpc.StatusCode.OK
    assert responses[-1].event.cancelled.reason == job_pb2.CANCEL_REASON_CALLER_LEFT


def test_a_caller_of_the_same_request_keeps_the_job_of_one_that_leaves(narrow: Stub) -> None:
    message = request(num_inference_steps=20, request_id="two-callers")
    first, second = narrow.Generate(message), narrow.Generate(message)
    job_ids = {read_until(call, is_progress)[-1].job_id for call in (first, second)}
    assert len(job_ids) == 1
    first.cancel()
    assert follow(second).kinds[-1] == "succeeded"


def test_a_watcher_is_told_that_the_deadline_of_the_caller_has_passed(narrow: Stub) -> None:
    # Of a size that was never measured: otherwise it may be refused at once.
    message = request(num_inference_steps=LONG_STEPS, width=528, height=512)
    call, first = begun(lambda seconds: narrow.Generate(message, timeout=seconds))
    watcher = watch(narrow, first.job_id)
    assert read_stream(call)[1] == grpc.StatusCode.DEADLINE_EXCEEDED
    responses, code = read_stream(watcher)
    assert code == grpc.StatusCode.OK
    last = responses[-1].event
    assert last.cancelled.reason == job_pb2.CANCEL_REASON_DEADLINE
    assert get(narrow, responses[-1].job_id).error.code == code_pb2.DEADLINE_EXCEEDED


def test_a_job_that_is_deleted_is_watched_no_more(stub: Stub) -> None:
    job = drawn(stub)
    last = events(stub, job.job_id)[-1]
    delete(stub, job.job_id)
    for after_sequence in (0, last.sequence):
        not_found(lambda after=after_sequence: events(stub, job.job_id, after))  # type: ignore[misc]


def test_a_job_that_breaks_the_ranks_again_fails_alone_and_tells_an_error_id_that_the_log_has(
    narrow: Stub, narrow_server: NarrowServer
) -> None:
    live = narrow_server.live
    message = submission("breaks-the-ranks", num_inference_steps=LONG_STEPS, width=256, height=256)
    job_id = narrow.SubmitJob(message).job_id
    generate = image_gen_pb2.GenerateRequest(spec=message.spec, request_id=message.request_id, detached=True)
    caller = narrow.Generate(generate)
    behind = submit(narrow).job_id
    watcher = watch(narrow, job_id)
    for attempt in (1, 2):
        read_until(watcher, lambda event: event.progress.step > 0)
        assert get(narrow, job_id).execution.attempt == attempt
        os.kill(live.rank_pids()[0], signal.SIGSEGV)
        if attempt == 1:
            restarted = read_until(watcher, lambda event: event.HasField("restarted"))[-1].event.restarted
            assert restarted.attempt == 2
    responses, code = read_stream(watcher)
    assert code == grpc.StatusCode.OK
    failed = responses[-1].event.failed
    assert failed.status.code == code_pb2.INTERNAL
    info = error_details_pb2.ErrorInfo()
    assert failed.status.details[0].Unpack(info)
    assert (info.reason, info.domain) == ("INTERNAL", "hidream.v1")
    error_id = info.metadata["error_id"]
    wait_until(lambda: f"error_id={error_id}" in live.log, 10, "the log has the error id")
    # Its caller is told the same as the status of the call, and so is who looks later.
    (told,) = refusal(lambda: follow(caller), grpc.StatusCode.INTERNAL, error_details_pb2.ErrorInfo())
    assert told == info
    job = get(narrow, job_id)
    assert (job.state, job.error) == (FAILED, failed.status)
    assert events(narrow, job_id)[-1] == responses[-1].event
    # The next one is drawn, and the request id is free.
    wait_for_state(narrow, behind, job_pb2.JOB_STATE_SUCCEEDED)
    again = narrow.SubmitJob(message)
    assert again.job_id != job_id
