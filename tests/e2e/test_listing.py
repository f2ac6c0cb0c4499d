"""Jobs by state and label, page by page."""

from __future__ import annotations

from typing import Any

import pytest

from hidream.v1 import image_gen_pb2, job_pb2
from tests.support.job_calls import (
    WAIT_SECONDS,
    Stub,
    bad_fields,
    cancel,
    delete,
    drawn,
    get,
    listed,
    running,
    submission,
    submit,
    submit_batch,
    wait_for_state,
)
from tests.support.live_server import LiveServer

QUEUED, RUNNING = job_pb2.JOB_STATE_QUEUED, job_pb2.JOB_STATE_RUNNING
SUCCEEDED, FAILED = job_pb2.JOB_STATE_SUCCEEDED, job_pb2.JOB_STATE_FAILED
CANCELLED = job_pb2.JOB_STATE_CANCELLED


def page(stub: Stub, **query: Any) -> image_gen_pb2.ListJobsResponse:
    return stub.ListJobs(image_gen_pb2.ListJobsRequest(**query))


def test_jobs_are_listed_by_state_newest_first_as_they_are_now(narrow: Stub) -> None:
    label = {"listing": "states"}
    succeeded = drawn(narrow, labels=label).job_id
    runs = running(narrow, labels=label)
    waiting, cancelled = [submit(narrow, labels=label).job_id for _ in range(2)]
    cancel(narrow, cancelled)

    def of_states(*states: job_pb2.JobState.ValueType) -> list[str]:
        return listed(narrow, labels=label, states=states)

    assert of_states() == [cancelled, waiting, runs, succeeded]
    assert of_states(QUEUED) == [waiting]
    assert of_states(RUNNING) == [runs]
    assert of_states(SUCCEEDED) == [succeeded]
    assert of_states(CANCELLED) == [cancelled]
    assert of_states(FAILED) == []
    assert of_states(SUCCEEDED, QUEUED, SUCCEEDED) == [waiting, succeeded]
    shown = {job.job_id: job for job in page(narrow, labels=label).jobs}
    for job_id in (succeeded, cancelled):
        assert shown[job_id] == get(narrow, job_id)
    assert shown[waiting].queue_position == 1
    assert shown[runs].progress.step >= 1


def test_a_listed_job_carries_every_label_that_was_asked_for(stub: Stub) -> None:
    both, one = [
        submit(stub, labels={"listing": "labels", **labels}).job_id
        for labels in ({"colour": "red", "size": "small"}, {"colour": "red"})
    ]
    assert listed(stub, labels={"listing": "labels"}) == [one, both]
    assert listed(stub, labels={"listing": "labels", "size": "small", "colour": "red"}) == [both]
    assert listed(stub, labels={"listing": "labels", "colour": "blue"}) == []
    assert listed(stub, labels={"listing": "labels", "size": ""}) == []
    assert {one, both} <= set(listed(stub))


def test_pages_hold_each_job_once_whatever_comes_and_goes_meanwhile(stub: Stub) -> None:
    label = {"listing": "pages"}
    jobs = [job.job_id for job in submit_batch(stub, *(submission(labels=label) for _ in range(6)))]
    for job_id in jobs:
        wait_for_state(stub, job_id, SUCCEEDED)
    newest_first = jobs[::-1]
    first = page(stub, labels=label, page_size=2)
    assert [job.job_id for job in first.jobs] == newest_first[:2]
    submit(stub, labels=label)
    # The job that the token was made of, and one that is still to come.
    delete(stub, newest_first[1])
    delete(stub, newest_first[3])
    second = page(stub, labels=label, page_size=2, page_token=first.next_page_token)
    assert [job.job_id for job in second.jobs] == [newest_first[2], newest_first[4]]
    # Another size is no other filter.
    last = page(stub, labels=label, page_size=5, page_token=second.next_page_token)
    assert [job.job_id for job in last.jobs] == [newest_first[5]]
    assert last.next_page_token == ""
    # A token may be used again.
    again = page(stub, labels=label, page_size=2, page_token=first.next_page_token)
    assert [job.job_id for job in again.jobs] == [job.job_id for job in second.jobs]


def test_a_page_that_ends_with_the_last_job_is_the_last(stub: Stub) -> None:
    label = {"listing": "last"}
    jobs = [job.job_id for job in submit_batch(stub, submission(labels=label), submission(labels=label))]
    whole = page(stub, labels=label, page_size=2)
    assert [job.job_id for job in whole.jobs] == jobs[::-1]
    assert whole.next_page_token == ""
    assert page(stub, labels={"listing": "nobody has this"}) == image_gen_pb2.ListJobsResponse()


@pytest.mark.long
def test_a_page_holds_1_to_1000_jobs_and_100_when_nothing_is_said(stub: Stub) -> None:
    for size in (-1, 1001, 2**31 - 1):
        assert set(bad_fields(lambda size=size: page(stub, page_size=size))) == {"page_size"}  # type: ignore[misc]
    label = {"listing": "sizes"}
    submit_batch(stub, *(submission("sizes", label) for _ in range(2)))
    for size in (0, 1, 1000):
        assert len(page(stub, labels=label, page_size=size).jobs) == 1
    for batch in (51, 50):
        jobs = submit_batch(stub, *(submission(labels=label, num_inference_steps=1) for _ in range(batch)))
        for job in jobs:
            cancel(stub, job.job_id)
    assert [len(page(stub, labels=label, page_size=size).jobs) for size in (0, 1000)] == [100, 102]


def test_a_token_that_is_none_of_this_filter_is_named(stub: Stub) -> None:
    label = {"listing": "tokens"}
    submit_batch(stub, *(submission(labels=label) for _ in range(2)))
    token = page(stub, labels=label, page_size=1).next_page_token
    assert page(stub, labels=label, page_token=token).jobs
    queries: dict[str, dict[str, Any]] = {
        "of no page": {"labels": label, "page_token": "none of ours"},
        "cut off": {"labels": label, "page_token": token[:-2]},
        "changed": {"labels": label, "page_token": token.swapcase()},
        "of other labels": {"labels": {"listing": "other"}, "page_token": token},
        "of no labels": {"page_token": token},
        "of other states": {"labels": label, "states": [RUNNING], "page_token": token},
    }
    for query in queries.values():
        assert set(bad_fields(lambda query=query: page(stub, **query))) == {"page_token"}  # type: ignore[misc]


@pytest.mark.parametrize("call", ["ListJobs", "WatchJobs"])
def test_a_filter_that_no_job_can_match_is_refused(stub: Stub, server: LiveServer, call: str) -> None:
    limits = server.info().limits

    def told(**query: Any) -> dict[str, str]:
        if call == "ListJobs":
            return bad_fields(lambda: page(stub, **query))
        return bad_fields(
            lambda: next(stub.WatchJobs(image_gen_pb2.WatchJobsRequest(**query), timeout=WAIT_SECONDS))
        )

    assert set(told(states=[QUEUED, 0, 77])) == {"states[1]", "states[2]"}
    many = {str(number): "" for number in range(limits.max_labels + 1)}
    assert str(limits.max_labels) in told(labels=many)["labels"]
    long = "x" * (limits.max_label_bytes + 1)
    assert set(told(labels={"k": long, "": "v"}, states=[9])) == {"states[0]", "labels[k]", "labels[]"}
    # However much is wrong, the answer arrives.
    assert "states[0]" in told(states=[77] * 50_000)


def test_everything_that_is_wrong_with_a_list_is_named_at_once(stub: Stub) -> None:
    wrong = {"page_size": -1, "page_token": "none of ours", "states": [77], "labels": {"": ""}}
    assert set(bad_fields(lambda: page(stub, **wrong))) == {
        "states[0]",
        "labels[]",
        "page_size",
        "page_token",
    }


def test_a_filter_may_hold_as_many_labels_as_a_job_and_say_a_state_again_and_again(
    stub: Stub, server: LiveServer
) -> None:
    num_labels = server.info().limits.max_labels
    labels = {"listing": "largest", **{str(number): "" for number in range(num_labels - 1)}}
    job = submit(stub, labels=labels)
    states = [QUEUED, RUNNING, SUCCEEDED] * 20_000
    assert listed(stub, labels=labels, states=states) == [job.job_id]
