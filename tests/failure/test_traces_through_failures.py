"""One trace, whatever becomes of the servers and ranks that work for it."""

from __future__ import annotations

import os
import secrets
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.job_calls import events, watch
from tests.support.live_bridge import running_bridge
from tests.support.live_server import LiveServer, running_server
from tests.support.postgres import PostgresServer
from tests.support.trace_receiver import TraceReceiver, trace_receiver, traceparent

STEPS = 30
REQUEST = "POST /v1/jobs"
CALL = "hidream.v1.ImageGen/SubmitJob"
CALLER_SPAN_ID = "00f067aa0ba902b7"


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[TraceReceiver]:
    """What receives the spans of all servers and bridges of a test."""
    with trace_receiver() as receiver:
        for name, value in receiver.environment().items():
            monkeypatch.setenv(name, value)
        yield receiver


def begun(server: LiveServer, receiver: TraceReceiver, trace_id: str) -> str:
    """Submit a job over HTTP, and wait until it has taken steps, and the spans before them are exported."""
    spec = {"prompt": "a red circle", "width": 64, "height": 64, "numInferenceSteps": STEPS}
    with running_bridge(server.address) as bridge, bridge.client() as http:
        headers = dict(traceparent(trace_id, CALLER_SPAN_ID))
        job_id = (
            http.post("/v1/jobs", json={"spec": spec}, headers=headers).raise_for_status().json()["jobId"]
        )
    with server.stub() as stub:
        for response in watch(stub, job_id):
            if response.event.progress.step >= 3:
                break
    receiver.wait_for(trace_id, REQUEST, CALL, "queue", "encode")
    return job_id


def is_one_trace_of_two_servers(receiver: TraceReceiver, trace_id: str) -> None:
    receiver.wait_for(trace_id, "job", "denoise", "decode", "store")
    (request,), (call,), (job,) = (receiver.of(trace_id, name) for name in (REQUEST, CALL, "job"))
    assert request.parent_id == CALLER_SPAN_ID
    assert call.parent_id == request.span_id
    assert job.parent_id == call.span_id
    first, second = receiver.of(trace_id, "encode")
    assert [span.attributes["hidream.attempt"] for span in (first, second)] == [1, 2]
    assert first.resource["service.instance.id"] != second.resource["service.instance.id"]
    (denoise,) = receiver.of(trace_id, "denoise")
    assert denoise.events[-1][2]["hidream.step"] == STEPS
    stages = receiver.of(trace_id, "queue", "encode", "denoise", "decode", "store")
    assert {span.parent_id for span in stages} == {job.span_id}
    assert [span.name for span in stages].count("queue") == 1


def test_a_server_that_is_killed_in_mid_picture_and_started_again_leaves_one_trace(
    receiver: TraceReceiver, tmp_path: Path
) -> None:
    trace_id = secrets.token_hex(16)
    flags = ("--data-dir", str(tmp_path))
    with running_server(*flags) as server:
        job_id = begun(server, receiver, trace_id)
        server.process.send_signal(signal.SIGKILL)
        server.process.wait()
    with running_server(*flags) as server, server.stub() as stub:
        events(stub, job_id)
        is_one_trace_of_two_servers(receiver, trace_id)


@pytest.mark.long
def test_a_rank_that_is_killed_in_mid_picture_is_the_error_of_the_steps_before_it(
    receiver: TraceReceiver,
) -> None:
    trace_id = secrets.token_hex(16)
    with running_server("--devices", "0,1") as server:
        job_id = begun(server, receiver, trace_id)
        os.kill(server.rank_pids()[1], signal.SIGKILL)
        with server.stub() as stub:
            events(stub, job_id)
        receiver.wait_for(trace_id, "job", "store")
    lost, continued = receiver.of(trace_id, "denoise")
    assert lost.is_error
    assert "rank 1" in lost.status_message
    assert not continued.is_error
    assert continued.attributes["hidream.attempt"] == 2
    assert continued.attributes["hidream.resumed_from_step"] == lost.events[-1][2]["hidream.step"]
    assert {span.attributes["hidream.rank"] for span in receiver.of(trace_id, "denoise on rank")} == {0, 1}


@pytest.mark.long
def test_a_job_whose_server_is_killed_keeps_its_trace_at_another_replica(
    receiver: TraceReceiver, postgres: PostgresServer, tmp_path: Path
) -> None:
    trace_id = secrets.token_hex(16)
    with postgres.database() as url:
        flags = ("--store", url, "--artifacts", f"file://{tmp_path}", "--lease-seconds", "1")
        with (
            running_server(*flags, environment=named("first")) as first,
            running_server(*flags, environment=named("second")) as second,
        ):
            job_id = begun(first, receiver, trace_id)
            # Either may have claimed it.
            (encode,) = receiver.of(trace_id, "encode")
            is_first = encode.resource["service.instance.id"] == "first"
            drawing, other = (first, second) if is_first else (second, first)
            drawing.process.send_signal(signal.SIGKILL)
            with other.stub() as stub:
                events(stub, job_id)
                is_one_trace_of_two_servers(receiver, trace_id)


def named(instance: str) -> dict[str, str]:
    return {"OTEL_RESOURCE_ATTRIBUTES": f"service.instance.id={instance}"}
