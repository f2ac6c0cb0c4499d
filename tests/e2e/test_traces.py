"""Traces as a receiver of OTLP gets them from a real server, and the ids of them in its log."""

from __future__ import annotations

import json
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from hidream.v1 import image_gen_pb2
from tests.support.job_calls import cancel, drawn, events, running, submission
from tests.support.live_bridge import LiveBridge, running_bridge
from tests.support.live_server import STOP_TIMEOUT_SECONDS, LiveServer, running_server
from tests.support.streams import follow, request
from tests.support.trace_receiver import ReceivedSpan, TraceReceiver, trace_receiver, traceparent

STAGES = ("queue", "encode", "denoise", "decode", "store")
STEPS = 4


@pytest.fixture(scope="module")
def receiver() -> Iterator[TraceReceiver]:
    with trace_receiver() as receiver:
        yield receiver


@pytest.fixture(scope="module")
def traced(receiver: TraceReceiver) -> Iterator[LiveServer]:
    """A server that exports its traces, and logs in JSON."""
    environment = receiver.environment() | {"OTEL_RESOURCE_ATTRIBUTES": "deployment.environment.name=test"}
    flags = ("--devices", "0,1", "--log-format", "json", "--log-level", "DEBUG", "--max-running-jobs", "1")
    with running_server(*flags, environment=environment) as server:
        yield server


@pytest.fixture
def trace_id() -> str:
    return secrets.token_hex(16)


def one(receiver: TraceReceiver, trace_id: str, name: str) -> ReceivedSpan:
    (span,) = receiver.of(trace_id, name)
    return span


def json_line(server: LiveServer, *texts: str) -> dict[str, Any]:
    (line,) = server.logged_lines(*texts)
    return json.loads(line)


def test_one_trace_leads_from_the_callers_span_to_the_last_step_of_each_rank(
    traced: LiveServer, receiver: TraceReceiver, trace_id: str
) -> None:
    caller_span_id = secrets.token_hex(8)
    with traced.stub() as stub:
        metadata = traceparent(trace_id, caller_span_id)
        stream = follow(stub.Generate(request(num_inference_steps=STEPS), metadata=metadata))
    receiver.wait_for(trace_id, "hidream.v1.ImageGen/Generate", "job", *STAGES)

    call = one(receiver, trace_id, "hidream.v1.ImageGen/Generate")
    assert call.parent_id == caller_span_id
    assert call.kind == Span.SPAN_KIND_SERVER
    assert call.attributes["rpc.system.name"] == "grpc"
    assert call.attributes["rpc.response.status_code"] == "OK"
    assert call.attributes["hidream.job_id"] == stream.job.job_id
    assert call.resource["service.name"] == "hidream-grpc"
    assert call.resource["deployment.environment.name"] == "test"
    job = one(receiver, trace_id, "job")
    assert job.parent_id == call.span_id
    assert job.attributes["hidream.state"] == "SUCCEEDED"
    for name in STAGES:
        stage = one(receiver, trace_id, name)
        assert stage.parent_id == job.span_id
        assert job.start <= stage.start <= stage.end <= job.end
    denoise = one(receiver, trace_id, "denoise")
    steps = [attributes for name, _, attributes in denoise.events if name == "step"]
    assert [step["hidream.step"] for step in steps] == [*range(1, STEPS + 1)]
    ranks = receiver.of(trace_id, "denoise on rank")
    assert sorted(span.attributes["hidream.rank"] for span in ranks) == [0, 1]
    for span in ranks:
        assert span.parent_id == denoise.span_id
        assert span.end <= denoise.end
        own_seconds = sum(
            step["hidream.rank_step_seconds"][span.attributes["hidream.rank"]] for step in steps
        )
        assert span.attributes["hidream.busy_seconds"] == pytest.approx(own_seconds)


def test_log_lines_of_a_call_and_of_its_job_have_the_ids_of_their_spans(
    traced: LiveServer, receiver: TraceReceiver, trace_id: str
) -> None:
    with traced.stub() as stub:
        metadata = traceparent(trace_id, secrets.token_hex(8))
        job_id = stub.SubmitJob(submission(), metadata=metadata).job_id
        events(stub, job_id)
    # The trace goes on after the call that began it.
    receiver.wait_for(trace_id, "hidream.v1.ImageGen/SubmitJob", "job")
    for text, name in (("SubmitJob OK", "hidream.v1.ImageGen/SubmitJob"), ("job succeeded", "job")):
        line = json_line(traced, f'"{text}"', job_id)
        span = one(receiver, trace_id, name)
        assert (line["trace_id"], line["span_id"]) == (span.trace_id, span.span_id)
    of_ranks = [json.loads(line) for line in traced.logged_lines('"starting"', job_id)]
    assert {line["span_id"] for line in of_ranks} == {one(receiver, trace_id, "job").span_id}


def test_a_job_that_never_starts_has_a_span_of_its_wait(
    traced: LiveServer, receiver: TraceReceiver, trace_id: str
) -> None:
    with traced.stub() as stub:
        running_id = running(stub)
        metadata = traceparent(trace_id, secrets.token_hex(8))
        waiting_id = stub.SubmitJob(submission(), metadata=metadata).job_id
        cancel(stub, waiting_id)
        cancel(stub, running_id)
    receiver.wait_for(trace_id, "queue", "job")
    job = one(receiver, trace_id, "job")
    assert one(receiver, trace_id, "queue").parent_id == job.span_id
    assert job.attributes["hidream.state"] == "CANCELLED"
    assert not job.is_error


def test_a_call_that_is_refused_has_its_status_and_is_no_error_of_the_server(
    traced: LiveServer, receiver: TraceReceiver, trace_id: str
) -> None:
    metadata = traceparent(trace_id, secrets.token_hex(8))
    with traced.stub() as stub, pytest.raises(grpc.RpcError):
        stub.SubmitJob(submission(width=1), metadata=metadata)
    receiver.wait_for(trace_id, "hidream.v1.ImageGen/SubmitJob")
    call = one(receiver, trace_id, "hidream.v1.ImageGen/SubmitJob")
    assert call.attributes["rpc.response.status_code"] == "INVALID_ARGUMENT"
    assert not call.is_error


def test_a_trace_that_its_caller_does_not_sample_is_not_exported_but_logged(
    traced: LiveServer, receiver: TraceReceiver, trace_id: str
) -> None:
    sampled_id = secrets.token_hex(16)
    with traced.stub() as stub:
        for metadata in (
            traceparent(trace_id, secrets.token_hex(8), is_sampled=False),
            traceparent(sampled_id, secrets.token_hex(8)),
        ):
            events(stub, stub.SubmitJob(submission(), metadata=metadata).job_id)
    # Spans arrive in the order in which they ended.
    receiver.wait_for(sampled_id, "job")
    assert receiver.of(trace_id) == []
    assert json_line(traced, "job succeeded", trace_id)


def test_calls_without_a_trace_or_with_a_broken_one_begin_their_own(
    traced: LiveServer, receiver: TraceReceiver
) -> None:
    with traced.stub() as stub:
        for metadata in ((), (("traceparent", "00-no-trace-01"),)):
            job_id = stub.SubmitJob(submission(), metadata=metadata).job_id
            line = json_line(traced, "SubmitJob OK", job_id)
            receiver.wait_for(line["trace_id"], "hidream.v1.ImageGen/SubmitJob")
            assert one(receiver, line["trace_id"], "hidream.v1.ImageGen/SubmitJob").parent_id == ""


@pytest.fixture
def traced_bridge(
    traced: LiveServer, receiver: TraceReceiver, monkeypatch: pytest.MonkeyPatch
) -> Iterator[LiveBridge]:
    """A bridge that exports its traces to the same receiver."""
    for name, value in receiver.environment().items():
        monkeypatch.setenv(name, value)
    with running_bridge(traced.address) as bridge:
        yield bridge


def test_one_trace_leads_from_a_request_of_http_to_the_end_of_its_job(
    traced_bridge: LiveBridge, receiver: TraceReceiver, trace_id: str
) -> None:
    caller_span_id = secrets.token_hex(8)
    headers = dict(traceparent(trace_id, caller_span_id)) | {"tracestate": "vendor=1"}
    spec = {"prompt": "a red circle", "width": 64, "height": 64, "numInferenceSteps": 2}
    with traced_bridge.client() as http:
        answer = http.post("/v1/jobs", json={"spec": spec}, headers=headers)
    assert answer.status_code == 200, answer.text
    receiver.wait_for(trace_id, "POST /v1/jobs", "hidream.v1.ImageGen/SubmitJob", "job", *STAGES)
    request = one(receiver, trace_id, "POST /v1/jobs")
    call = one(receiver, trace_id, "hidream.v1.ImageGen/SubmitJob")
    assert request.parent_id == caller_span_id
    assert request.kind == Span.SPAN_KIND_SERVER
    assert request.attributes["http.response.status_code"] == 200
    assert request.resource["service.name"] == "hidream-http"
    assert call.parent_id == request.span_id
    assert one(receiver, trace_id, "job").parent_id == call.span_id


def test_a_bridge_that_is_not_traced_passes_the_trace_of_its_caller_on(
    traced: LiveServer, receiver: TraceReceiver, trace_id: str
) -> None:
    caller_span_id = secrets.token_hex(8)
    with running_bridge(traced.address) as bridge, bridge.client() as http:
        http.get("/v1/server", headers=dict(traceparent(trace_id, caller_span_id)))
    receiver.wait_for(trace_id, "hidream.v1.ImageGen/GetServerInfo")
    assert one(receiver, trace_id, "hidream.v1.ImageGen/GetServerInfo").parent_id == caller_span_id


@pytest.fixture
def silent_endpoint() -> Iterator[str]:
    """A port that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.long
def test_a_receiver_that_does_not_answer_costs_one_line_and_neither_calls_nor_the_end_wait(
    silent_endpoint: str,
) -> None:
    environment = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": silent_endpoint,
        "OTEL_EXPORTER_OTLP_TIMEOUT": "3",
        "OTEL_BSP_SCHEDULE_DELAY": "50",
    }
    with running_server(environment=environment) as server:
        with server.stub() as stub:
            drawn(stub)
            server.logged_lines("cannot export traces")
            start = time.monotonic()
            for _ in range(50):
                stub.GetServerInfo(image_gen_pb2.GetServerInfoRequest())
            # Each export takes three seconds; on busy cores each call some tenths.
            assert time.monotonic() - start < 50
        server.process.terminate()
        server.process.wait(STOP_TIMEOUT_SECONDS)
    # The log is read to its end by now.
    lines = [line for line in server.log_lines if "hidream.otlp" in line or "opentelemetry" in line]
    assert len(lines) == 2, lines
    assert "cannot export traces" in lines[0]
    assert "the last spans were not exported within 1 s" in lines[1]


def test_without_variables_of_opentelemetry_nothing_of_it_is_imported(tmp_path: Path) -> None:
    program = f"""
import asyncio, sys
from hidream_grpc.settings import load_settings
from hidream_grpc.server.app import build
async def main():
    settings = load_settings({{"data_dir": {str(tmp_path)!r}, "devices": "0", "device_type": "cpu"}}, None)
    service = build(settings)
    assert service.tracing is None
    print([name for name in sys.modules if name.startswith("opentelemetry")])
asyncio.run(main())
"""
    environment = {"PATH": "", "PYTHONPATH": ":".join(sys.path), "HOME": str(tmp_path)}
    output = subprocess.run(
        [sys.executable, "-c", program], env=environment, check=True, capture_output=True, text=True
    )
    assert output.stdout == "[]\n"
