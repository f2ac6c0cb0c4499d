"""One trace, whatever becomes of the servers and ranks that work for it."""

from __future__ import annotations

import secrets
import signal
from pathlib import Path

import pytest

from tests.support.job_calls import events, submission, watch
from tests.support.live_server import LiveServer, running_server
from tests.support.postgres import PostgresServer
from tests.support.trace_receiver import TraceReceiver, trace_receiver, traceparent

STEPS = 60
CALL = "hidream.v1.ImageGen/SubmitJob"


def begun(server: LiveServer, receiver: TraceReceiver, trace_id: str) -> str:
    """Submit a traced job, and wait until steps of it and the spans before them would survive the server."""
    with server.stub() as stub:
        metadata = traceparent(trace_id, "00f067aa0ba902b7")
        job = submission(num_inference_steps=STEPS, width=128, height=128)
        job_id = stub.SubmitJob(job, metadata=metadata).job_id
        for response in watch(stub, job_id):
            if response.event.progress.step >= 3:
                break
    receiver.wait_for(trace_id, CALL, "queue", "encode")
    return job_id


def is_one_trace_of_two_servers(receiver: TraceReceiver, trace_id: str) -> None:
    receiver.wait_for(trace_id, "job", "denoise", "decode", "store")
    (call,), (job,) = receiver.of(trace_id, CALL), receiver.of(trace_id, "job")
    assert job.parent_id == call.span_id
    assert job.start >= call.start
    first, second = receiver.of(trace_id, "encode")
    assert [span.attributes["hidream.attempt"] for span in (first, second)] == [1, 2]
    assert first.resource["service.instance.id"] != second.resource["service.instance.id"]
    (denoise,) = receiver.of(trace_id, "denoise")
    assert denoise.events[-1][2]["hidream.step"] == STEPS
    stages = receiver.of(trace_id, "queue", "encode", "denoise", "decode", "store")
    assert {span.parent_id for span in stages} == {job.span_id}
    assert [span.name for span in stages].count("queue") == 1


def test_a_server_that_is_killed_in_mid_picture_and_started_again_leaves_one_trace(tmp_path: Path) -> None:
    trace_id = secrets.token_hex(16)
    with trace_receiver() as receiver:
        flags = ("--data-dir", str(tmp_path))
        with running_server(*flags, environment=receiver.environment()) as server:
            job_id = begun(server, receiver, trace_id)
            server.process.send_signal(signal.SIGKILL)
            server.process.wait()
        with running_server(*flags, environment=receiver.environment()) as server:
            with server.stub() as stub:
                events(stub, job_id)
            is_one_trace_of_two_servers(receiver, trace_id)


@pytest.mark.long
def test_a_job_whose_server_is_killed_keeps_its_trace_at_another_replica(
    postgres: PostgresServer, tmp_path: Path
) -> None:
    trace_id = secrets.token_hex(16)
    with trace_receiver() as receiver, postgres.database() as url:
        flags = ("--store", url, "--artifacts", f"file://{tmp_path}", "--lease-seconds", "1")
        with running_server(*flags, environment=receiver.environment()) as first:
            job_id = begun(first, receiver, trace_id)
            with running_server(*flags, environment=receiver.environment()) as second:
                first.process.send_signal(signal.SIGKILL)
                with second.stub() as stub:
                    events(stub, job_id)
                is_one_trace_of_two_servers(receiver, trace_id)
