"""Streams of the server over HTTP: server-sent events, lines of JSON, and where they break off."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from hidream.v1 import job_pb2
from tests.support.job_calls import (
    DEADLINES_SECONDS,
    Stub,
    cancel,
    drawn,
    events,
    get,
    running,
    submit,
    wait_for_state,
)
from tests.support.live_bridge import running_bridge
from tests.support.live_server import running_server, wait_until

EVENT_STREAM = {"Accept": "text/event-stream"}
SPEC = {"prompt": "a red circle", "width": 64, "height": 64, "numInferenceSteps": 2}
# It does not end before it is cancelled, however quick the machine.
ENDLESS_SPEC = {**SPEC, "width": 512, "height": 512, "numInferenceSteps": 150}


def sent_events(lines: Iterator[str]) -> Iterator[dict[str, str]]:
    """The fields of each event; comments are left out."""
    event: dict[str, str] = {}
    for line in lines:
        if line and not line.startswith(":"):
            name, _, value = line.partition(": ")
            event[name] = value
        elif not line and event:
            yield event
            event = {}


@contextmanager
def event_source(http: httpx.Client, path: str, **headers: str) -> Iterator[Iterator[dict[str, str]]]:
    """The events of a stream, read as a browser does."""
    with http.stream("GET", path, headers={**EVENT_STREAM, **headers}) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        yield sent_events(answer.iter_lines())


def test_generate_streams_lines_of_json_to_the_end(http: httpx.Client) -> None:
    answer = http.post("/v1/generate", json={"spec": SPEC, "preview": True})
    assert answer.headers["content-type"] == "application/x-ndjson"
    lines = [json.loads(line) for line in answer.text.splitlines()]
    assert len({line["jobId"] for line in lines}) == 1
    kinds = [next(key for key in line["event"] if key not in ("sequence", "time")) for line in lines]
    assert {"started", "progress", "preview", "imageChunk"} <= set(kinds)
    assert kinds[-1] == "succeeded"


def test_the_events_of_a_job_have_their_sequence_as_id_and_go_on_from_there(
    http: httpx.Client, stub: Stub
) -> None:
    job_id = drawn(stub, prompt="a red circle").job_id
    # A moment after its end what is kept in no row, as that it waited, is forgotten.
    wait_until(lambda: not events(stub, job_id)[0].HasField("queued"), 10, "only what is kept is told")
    expected = [str(event.sequence) for event in events(stub, job_id)]
    path = f"/v1/jobs/{job_id}/events"
    with event_source(http, path) as all_events:
        received = list(all_events)
    assert [event["id"] for event in received] == expected
    assert json.loads(received[-1]["data"])["event"]["succeeded"]["job"]["jobId"] == job_id

    # The address of an EventSource stays the same when it comes back.
    again = http.get(f"{path}?after_sequence=0", headers={**EVENT_STREAM, "Last-Event-ID": expected[-2]})
    assert [event["id"] for event in sent_events(iter(again.text.splitlines()))] == expected[-1:]
    # 204 is the answer after which an EventSource asks no more.
    over = http.get(path, headers={**EVENT_STREAM, "Last-Event-ID": expected[-1]})
    assert (over.status_code, over.content) == (204, b"")


def test_a_stream_that_cannot_go_on_refuses_the_last_event_id(http: httpx.Client) -> None:
    for method, path, wrong in (("POST", "/v1/generate", "3"), ("GET", "/v1/jobs/a/events", "x")):
        refused = http.request(method, path, headers={"Last-Event-ID": wrong})
        assert [one["field"] for one in refused.json()["violations"]] == ["Last-Event-ID"]


def test_an_error_before_the_first_event_is_an_answer_of_its_own(http: httpx.Client) -> None:
    refused = http.get("/v1/jobs/0123456789abcdef/events", headers=EVENT_STREAM)
    assert refused.status_code == 404
    assert refused.headers["content-type"] == "application/problem+json"


def test_all_jobs_of_a_caller_are_watched_as_they_change(http: httpx.Client, stub: Stub) -> None:
    with event_source(http, "/v1/jobs:watch?labels[test]=watched") as changes:
        # It is open before there is any job.
        job_id = submit(stub, prompt="a red circle", labels={"test": "watched"}).job_id
        for change in changes:
            job = json.loads(change["data"])["job"]
            assert job["jobId"] == job_id
            if job["state"] == "JOB_STATE_SUCCEEDED":
                break


def test_leaving_cancels_the_job_of_a_generate_call(http: httpx.Client, stub: Stub) -> None:
    body = {"spec": ENDLESS_SPEC}
    with http.stream("POST", "/v1/generate", json=body, headers=EVENT_STREAM) as answer:
        first = next(sent_events(answer.iter_lines()))
    job_id = json.loads(first["data"])["jobId"]
    wait_for_state(stub, job_id, job_pb2.JOB_STATE_CANCELLED)


def test_leaving_a_watch_does_not_touch_the_job(http: httpx.Client, stub: Stub) -> None:
    job_id = running(stub)
    with event_source(http, f"/v1/jobs/{job_id}/events") as watched:
        next(watched)
    assert get(stub, job_id).state == job_pb2.JOB_STATE_RUNNING
    cancel(stub, job_id)


@pytest.mark.parametrize("accept", ["text/event-stream", "*/*"])
def test_a_stream_that_breaks_off_says_why_and_does_not_end_as_if_whole(
    accept: str, http: httpx.Client
) -> None:
    # Of a size that was never measured: otherwise it may be refused at once.
    body = {"spec": {**ENDLESS_SPEC, "width": 528}}
    received = ""
    for seconds in DEADLINES_SECONDS:
        headers = {"Accept": accept, "Request-Timeout": str(seconds)}
        with http.stream("POST", "/v1/generate", json=body, headers=headers) as answer:
            if answer.status_code == 504:
                # It passed before the stream began.
                continue
            assert answer.status_code == 200
            with pytest.raises(httpx.RemoteProtocolError):
                for text in answer.iter_text():
                    received += text
        break
    last = received.strip().splitlines()[-1]
    problem: dict[str, Any]
    if accept == "*/*":
        problem = json.loads(last)["error"]
    else:
        assert "event: problem\n" in received
        problem = json.loads(last.removeprefix("data: "))
    assert (problem["status"], problem["code"]) == (504, "DEADLINE_EXCEEDED")


@pytest.mark.long
def test_the_streams_of_a_server_that_is_killed_break_off_with_a_problem() -> None:
    with running_server() as server, running_bridge(server.address) as bridge, bridge.client() as http:
        job_id = http.post("/v1/jobs", json={"spec": ENDLESS_SPEC}).json()["jobId"]
        received: list[dict[str, str]] = []
        breaks_off = pytest.raises(httpx.RemoteProtocolError)
        with event_source(http, f"/v1/jobs/{job_id}/events") as watched, breaks_off:
            for event in watched:
                if not received:
                    server.process.kill()
                received.append(event)
        assert (received[-1]["event"], received[-1]["retry"]) == ("problem", "1000")
        assert json.loads(received[-1]["data"])["code"] == "UNAVAILABLE"
        gone = http.get(f"/v1/jobs/{job_id}")
        assert (gone.status_code, gone.headers["retry-after"]) == (503, "1")
