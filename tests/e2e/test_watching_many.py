"""One stream of the states of many jobs."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc

from hidream.v1 import image_gen_pb2, job_pb2
from tests.support.job_calls import Stub, cancel, drawn, events, get, read_stream, running, submit, watch

QUEUED, RUNNING = job_pb2.JOB_STATE_QUEUED, job_pb2.JOB_STATE_RUNNING
SUCCEEDED, CANCELLED = job_pb2.JOB_STATE_SUCCEEDED, job_pb2.JOB_STATE_CANCELLED

Change = image_gen_pb2.WatchJobsResponse
Told = tuple[str, job_pb2.JobState.ValueType]


@contextmanager
def watching(stub: Stub, **query: Any) -> Iterator[Any]:
    """An open stream, which is closed when the block ends."""
    call: Any = stub.WatchJobs(image_gen_pb2.WatchJobsRequest(**query))
    try:
        yield call
    finally:
        call.cancel()


def read(changes: Iterator[Change], last: Told) -> list[Told]:
    """What is told, up to and with the last."""
    told: list[Told] = []
    for change in changes:
        told.append((change.job.job_id, change.job.state))
        if told[-1] == last:
            return told
    raise AssertionError(f"the stream ended after {told}")


def test_a_watcher_is_told_the_jobs_that_match_and_then_each_change(stub: Stub) -> None:
    label = {"watched": "many"}
    older, newer = [drawn(stub, labels=label).job_id for _ in range(2)]
    with watching(stub, labels=label) as changes:
        assert {next(changes).job.job_id, next(changes).job.job_id} == {older, newer}
        drawn(stub)
        job_id = drawn(stub, labels={**label, "and": "more"}, num_inference_steps=20).job_id
        told = read(changes, (job_id, SUCCEEDED))
    # A state that was left before it could be told is passed over.
    assert told[0] in ((job_id, QUEUED), (job_id, RUNNING))
    assert told == sorted(told, key=lambda change: change[1])
    assert {told_id for told_id, _ in told} == {job_id}


def test_every_state_of_a_job_is_told_with_the_job_as_it_is_then(narrow: Stub) -> None:
    label = {"watched": "states"}
    running(narrow)
    with watching(narrow, labels=label) as changes:
        waiting = submit(narrow, labels=label)
        queued = next(changes)
        assert (queued.job.job_id, queued.job.state) == (waiting.job_id, QUEUED)
        assert queued.job.queue_position == 1
        cancel(narrow, waiting.job_id)
        cancelled = next(changes)
    assert cancelled.job == get(narrow, waiting.job_id)
    assert cancelled.job.state == CANCELLED
    assert cancelled.change_time == cancelled.job.end_time
    assert waiting.create_time.ToNanoseconds() <= queued.change_time.ToNanoseconds()
    assert queued.change_time.ToNanoseconds() <= cancelled.change_time.ToNanoseconds()


def test_a_filter_of_states_tells_those_in_them_and_those_that_leave_them(narrow: Stub) -> None:
    label = {"watched": "filter"}
    drawn(narrow, labels=label)
    runs = running(narrow, labels=label)
    waits, stays = [submit(narrow, labels=label).job_id for _ in range(2)]
    with (
        watching(narrow, labels=label, states=[RUNNING]) as of_running,
        watching(narrow, labels=label, states=[QUEUED]) as of_queued,
        watching(narrow, labels=label, states=[SUCCEEDED, CANCELLED]) as of_ended,
    ):
        assert next(of_running).job.job_id == runs
        assert {next(of_queued).job.job_id, next(of_queued).job.job_id} == {waits, stays}
        assert next(of_ended).job.state == SUCCEEDED
        cancel(narrow, stays)
        cancel(narrow, runs)
        events(narrow, waits)
        told = read(of_running, (waits, SUCCEEDED))
        assert (runs, CANCELLED) in told
        # It was cancelled while it waited: it never was in the state that was asked for, nor left it.
        assert stays not in {job_id for job_id, _ in told}
        assert set(read(of_queued, (waits, RUNNING))) == {(stays, CANCELLED), (waits, RUNNING)}
        ended = read(of_ended, (waits, SUCCEEDED))
        assert set(ended) == {(stays, CANCELLED), (runs, CANCELLED), (waits, SUCCEEDED)}


def test_without_a_filter_every_job_is_told(stub: Stub) -> None:
    job = drawn(stub)
    with watching(stub) as changes:
        read(changes, (job.job_id, SUCCEEDED))
        other = submit(stub, labels={"watched": "or not"})
        read(changes, (other.job_id, SUCCEEDED))


def test_all_readers_are_told_the_same(narrow: Stub) -> None:
    label = {"watched": "by several"}
    known = drawn(narrow, labels=label).job_id
    runs = running(narrow)
    with (
        watching(narrow, labels=label) as first,
        watching(narrow, labels=label) as second,
        watching(narrow, labels=label) as third,
        ThreadPoolExecutor() as threads,
    ):
        readers = (first, second, third)
        assert [next(reader).job.job_id for reader in readers] == [known] * 3
        waits = submit(narrow, labels=label).job_id
        for reader in readers:
            assert read(reader, (waits, QUEUED)) == [(waits, QUEUED)]
        cancel(narrow, runs)
        ends = list(threads.map(lambda reader: read(reader, (waits, SUCCEEDED))[-1], readers))
    assert ends == [(waits, SUCCEEDED)] * 3


def test_a_watcher_that_closes_its_stream_touches_nothing(narrow: Stub) -> None:
    label = {"watched": "and left"}
    job_id = running(narrow, labels=label)
    with watching(narrow, labels=label) as changes:
        assert next(changes).job.job_id == job_id
    step = get(narrow, job_id).progress.step
    assert any(response.event.progress.step > step for response in watch(narrow, job_id))
    assert get(narrow, job_id).state == RUNNING


def test_a_deadline_ends_the_stream(stub: Stub) -> None:
    call = stub.WatchJobs(image_gen_pb2.WatchJobsRequest(labels={"watched": "in vain"}), timeout=0.2)
    assert read_stream(call) == ([], grpc.StatusCode.DEADLINE_EXCEEDED)
