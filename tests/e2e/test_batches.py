"""Many jobs in one call: all of them are accepted, or none."""

from __future__ import annotations

import grpc
from google.rpc import error_details_pb2

from hidream.v1 import job_pb2
from tests.e2e.conftest import NarrowServer
from tests.support.job_calls import (
    Stub,
    bad_fields,
    cancel,
    get,
    listed,
    refusal,
    running,
    submission,
    submit,
    submit_batch,
    wait_for_state,
)
from tests.support.live_server import LiveServer


def test_the_jobs_of_a_batch_come_back_in_its_order_and_are_drawn_in_it(narrow: Stub) -> None:
    ahead = running(narrow)
    jobs = submit_batch(narrow, *(submission(f"in-order-{number}", seed=number) for number in (2, 0, 1)))
    assert [job.request_id for job in jobs] == ["in-order-2", "in-order-0", "in-order-1"]
    assert [job.spec.seed for job in jobs] == [2, 0, 1]
    assert [job.queue_position for job in jobs] == [1, 2, 3]
    assert [get(narrow, job.job_id).spec for job in jobs] == [job.spec for job in jobs]
    cancel(narrow, ahead)
    for job in jobs:
        wait_for_state(narrow, job.job_id, job_pb2.JOB_STATE_SUCCEEDED)
    starts = [get(narrow, job.job_id).start_time.ToNanoseconds() for job in jobs]
    assert starts == sorted(starts)


def test_jobs_without_request_ids_are_jobs_of_their_own(stub: Stub) -> None:
    jobs = submit_batch(stub, submission(), submission())
    assert len({job.job_id for job in jobs}) == len({job.request_id for job in jobs}) == 2


def test_one_bad_request_refuses_the_batch_and_each_wrong_field_is_named_with_its_place(
    stub: Stub, server: LiveServer
) -> None:
    label = {"batch": "one-is-bad"}
    total = server.info().jobs.total
    requests = [
        submission(labels=label),
        submission(labels=label, width=65, num_inference_steps=0),
        submission(labels=label, prompt="", priority=9),  # type: ignore[arg-type]
    ]
    told = bad_fields(lambda: submit_batch(stub, *requests))
    assert set(told) == {
        "requests[1].spec.width",
        "requests[1].spec.num_inference_steps",
        "requests[2].spec.prompt",
        "requests[2].priority",
    }
    assert "64" in told["requests[1].spec.width"]
    assert not listed(stub, labels=label)
    assert server.info().jobs.total == total


def test_more_wrong_fields_than_an_answer_holds_are_counted(stub: Stub, server: LiveServer) -> None:
    labels = {"界" * 100 + str(number): "" for number in range(40)}
    bad = submission("a b", labels, width=65, height=3, num_inference_steps=0, seed=-1)
    told = bad_fields(lambda: submit_batch(stub, *[bad] * server.info().limits.max_queued_jobs))
    assert {"requests[0].spec.width", "requests[0].spec.seed", "requests[0].request_id"} <= set(told)
    (*_, last) = told.values()
    assert "more violations do not fit here" in last


def test_a_batch_has_at_least_one_job_and_no_more_than_the_queue_ever_holds(
    narrow: Stub, narrow_server: NarrowServer
) -> None:
    assert bad_fields(lambda: submit_batch(narrow)) == {"requests": "must not be empty"}
    too_many = [submission() for _ in range(narrow_server.max_queued_jobs + 1)]
    told = bad_fields(lambda: submit_batch(narrow, *too_many))
    assert f"{narrow_server.max_queued_jobs} (max_queued_jobs)" in told["requests"]


def test_a_batch_for_which_the_queue_has_no_room_leaves_nothing(narrow: Stub) -> None:
    label = {"batch": "no-room"}
    running(narrow)
    waiting = submit(narrow, labels=label)
    requests = [submission(f"no-room-{number}", label) for number in range(3)]
    quota, retry = refusal(
        lambda: submit_batch(narrow, *requests),
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        error_details_pb2.QuotaFailure(),
        error_details_pb2.RetryInfo(),
    )
    assert quota.violations[0].subject == "max_queued_jobs"
    assert retry.retry_delay.ToNanoseconds() > 0
    assert listed(narrow, labels=label) == [waiting.job_id]
    # The room that is there is there for less.
    jobs = submit_batch(narrow, *requests[:2])
    assert listed(narrow, labels=label) == [jobs[1].job_id, jobs[0].job_id, waiting.job_id]


def test_a_batch_that_is_sent_again_is_the_same_jobs_though_the_queue_is_full(narrow: Stub) -> None:
    running(narrow)
    requests = [submission(f"sent-again-{number}") for number in range(3)]
    first = [job.job_id for job in submit_batch(narrow, *requests)]
    again = submit_batch(narrow, *requests)
    assert [(job.job_id, job.queue_position) for job in again] == list(zip(first, (1, 2, 3), strict=True))
    assert [job.job_id for job in submit_batch(narrow, requests[1])] == first[1:2]


def test_a_request_id_twice_in_a_batch_is_one_job_and_with_two_contents_it_refuses_all(stub: Stub) -> None:
    label = {"batch": "twice"}
    twin = submission("twin", label)
    first, between, second = submit_batch(stub, twin, submission("between", label), twin)
    assert first.job_id == second.job_id != between.job_id
    assert listed(stub, labels=label) == [between.job_id, first.job_id]
    unlike = {"batch": "unlike-twins"}
    requests = [submission(labels=unlike), *(submission("unlike", unlike, seed=seed) for seed in (1, 2))]
    refusal(
        lambda: submit_batch(stub, *requests),
        grpc.StatusCode.ALREADY_EXISTS,
        error_details_pb2.ResourceInfo(),
    )
    assert not listed(stub, labels=unlike)


def test_a_batch_joins_the_jobs_that_are_there_and_one_that_asks_for_something_else_refuses_all(
    stub: Stub,
) -> None:
    label = {"batch": "joins"}
    there = submit(stub, request_id="is-there", labels=label)
    joined, new = submit_batch(stub, submission("is-there", label), submission(labels=label))
    assert joined.job_id == there.job_id
    requests = [submission(labels=label), submission("is-there", label, seed=5)]
    (resource,) = refusal(
        lambda: submit_batch(stub, *requests),
        grpc.StatusCode.ALREADY_EXISTS,
        error_details_pb2.ResourceInfo(),
    )
    assert resource.resource_name == there.job_id
    assert listed(stub, labels=label) == [new.job_id, there.job_id]
