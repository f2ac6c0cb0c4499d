"""What a caller sees of the queue: its place, its turn, and a clear no when there is no room."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from hidream.v1 import image_gen_pb2, job_pb2
from hidream_grpc.jobs.estimates.accuracy import MIN_OUTCOMES
from hidream_grpc.jobs.estimates.durations import MIN_RECENT_STEPS
from tests.e2e.conftest import NarrowServer
from tests.support.job_calls import begun, read_stream
from tests.support.live_server import running_server
from tests.support.streams import follow, is_progress, read_until, request


def test_a_waiting_caller_sees_its_position_change_until_it_starts(narrow_server: NarrowServer) -> None:
    with narrow_server.live.stub() as stub:
        running = stub.Generate(request(num_inference_steps=150))
        read_until(running, is_progress)
        waiting = [stub.Generate(request(num_inference_steps=2, seed=seed)) for seed in (1, 2, 3)]
        for position, call in enumerate(waiting, start=1):
            assert next(call).event.queued.queue_position == position
        running.cancel()
        with ThreadPoolExecutor() as threads:
            streams = list(threads.map(follow, waiting))
    positions = [[event.queued.queue_position for event in s.of_kind("queued")] for s in streams]
    # The first may be told once more, with another estimate.
    assert set(positions[0]) <= {1}
    # A reader that is slower than the queue may miss a position, never see one grow.
    assert all(seen == sorted(seen, reverse=True) for seen in positions)
    assert positions[2][-1] == 1
    assert [s.job.state for s in streams] == [job_pb2.JOB_STATE_SUCCEEDED] * 3
    narrow_server.live.wait_until_idle()


def test_a_full_queue_accepts_nothing_and_says_when_to_come_back(narrow_server: NarrowServer) -> None:
    with narrow_server.live.stub() as stub:
        calls = [stub.Generate(request(num_inference_steps=150))]
        # It waits, too, until the engine has taken it.
        read_until(calls[0], is_progress)
        calls += [stub.Generate(request(num_inference_steps=150, seed=seed)) for seed in (1, 2, 3)]
        for call in calls[1:]:
            assert next(call).event.HasField("queued")
        total = narrow_server.live.info().jobs.total
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.Generate(request()))
        assert narrow_server.live.info().jobs.total == total
        for call in calls:
            call.cancel()
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    status = rpc_status.from_call(caught.value)
    assert status is not None
    quota, retry = error_details_pb2.QuotaFailure(), error_details_pb2.RetryInfo()
    assert status.details[0].Unpack(quota)
    assert status.details[1].Unpack(retry)
    assert quota.violations[0].subject == "max_queued_jobs"
    assert str(narrow_server.max_queued_jobs) in quota.violations[0].description
    assert retry.retry_delay.ToNanoseconds() > 0
    narrow_server.live.wait_until_idle()


def test_a_caller_that_leaves_the_queue_makes_room_for_those_behind_it(narrow_server: NarrowServer) -> None:
    with narrow_server.live.stub() as stub:
        running = stub.Generate(request(num_inference_steps=150))
        read_until(running, is_progress)
        first, second = (stub.Generate(request(num_inference_steps=1, seed=seed)) for seed in (1, 2))
        assert next(first).event.queued.queue_position == 1
        assert next(second).event.queued.queue_position == 2
        first.cancel()
        assert next(second).event.queued.queue_position == 1
        running.cancel()
        assert follow(second).job.state == job_pb2.JOB_STATE_SUCCEEDED
    narrow_server.live.wait_until_idle()


def test_a_job_whose_deadline_passes_in_the_queue_is_never_started(narrow_server: NarrowServer) -> None:
    with narrow_server.live.stub() as stub:
        running = stub.Generate(request(num_inference_steps=150, width=512, height=512))
        read_until(running, is_progress)
        # Of a size that was never measured: otherwise it may be refused at once.
        message = request(num_inference_steps=1, width=80)
        waiting, first = begun(lambda seconds: stub.Generate(message, timeout=seconds))
        responses, code = read_stream(waiting)
        assert code == grpc.StatusCode.DEADLINE_EXCEEDED
        assert {response.event.WhichOneof("event") for response in (first, *responses)} == {"queued"}
        running.cancel()
    narrow_server.live.wait_until_idle()


def test_what_cannot_end_before_its_deadline_is_refused_at_once() -> None:
    # Jobs of other tests, which end early since those in front are cancelled, make estimates uncertain.
    with running_server("--devices", "0") as server, server.stub() as stub:
        # The first job is not estimated: nothing was measured before it.
        for seed in range(MIN_OUTCOMES):
            follow(stub.Generate(request(num_inference_steps=2, seed=seed, width=64, height=64)))
        follow(stub.Generate(request(num_inference_steps=MIN_RECENT_STEPS, width=256, height=256)))
        total = server.info().jobs.total
        with pytest.raises(grpc.RpcError) as caught:
            too_much = request(num_inference_steps=150, num_images=8, width=256, height=256)
            list(stub.Generate(too_much, timeout=5.0))
        assert server.info().jobs.total == total
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    status = rpc_status.from_call(caught.value)
    assert status is not None, "the server says it, before the deadline has passed"
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert info.reason == "DEADLINE_TOO_SHORT"
    assert float(info.metadata["earliest_seconds"]) > 5.0


def test_a_job_of_high_priority_is_drawn_beside_one_that_runs_and_before_one_that_waits(
    narrow_server: NarrowServer,
) -> None:
    with narrow_server.live.stub() as stub:
        running = stub.Generate(request(num_inference_steps=150))
        read_until(running, is_progress)
        normal = stub.Generate(request(num_inference_steps=1))
        assert next(normal).event.queued.queue_position == 1
        high = stub.Generate(request(num_inference_steps=1, seed=1, priority=job_pb2.PRIORITY_HIGH))
        assert [response.event.WhichOneof("event") for response in high][-1] == "succeeded"
        # The one that it came before goes on, and has its place until it ends.
        read_until(running, is_progress)
        waiting = stub.ListJobs(image_gen_pb2.ListJobsRequest(states=[job_pb2.JOB_STATE_QUEUED])).jobs
        assert [job.queue_position for job in waiting] == [1]
        for call in (running, normal):
            call.cancel()
    narrow_server.live.wait_until_idle()
