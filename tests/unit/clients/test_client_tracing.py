"""Which of OpenTelemetry's variables ask for traces, and what is said of those that cannot be used."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Mapping

import pytest

from hidream.otlp import SpanExport
from hidream.tracing import span_export
from tests.support.live_server import wait_until
from tests.support.trace_receiver import trace_receiver
from tests.support.unused_ports import unused_port

ENDPOINT = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}


@pytest.fixture(autouse=True)
def no_other_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    "environment",
    [
        pytest.param({}, id="none"),
        pytest.param({"OTEL_EXPORTER_OTLP_ENDPOINT": " "}, id="an endpoint that is empty"),
        pytest.param({"OTEL_SERVICE_NAME": "images"}, id="a name alone"),
        pytest.param({**ENDPOINT, "OTEL_SDK_DISABLED": "True"}, id="disabled"),
        pytest.param({**ENDPOINT, "OTEL_TRACES_EXPORTER": "none"}, id="no exporter"),
        pytest.param({**ENDPOINT, "OTEL_TRACES_EXPORTER": "console"}, id="another exporter"),
    ],
)
def test_without_an_endpoint_or_against_it_there_are_no_traces_and_no_word(
    environment: Mapping[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    assert span_export(environment, "service", "1") is None
    assert caplog.records == []


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        pytest.param(
            {"OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}, "not over 'http/protobuf'", id="protocol"
        ),
        pytest.param({"OTEL_EXPORTER_OTLP_TIMEOUT": "soon"}, "'soon'", id="timeout"),
        pytest.param({"OTEL_EXPORTER_OTLP_COMPRESSION": "zip"}, '"zip"', id="compression"),
    ],
)
def test_variables_that_cannot_be_used_are_one_warning_that_says_which(
    variables: dict[str, str],
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for name, value in (ENDPOINT | variables).items():
        monkeypatch.setenv(name, value)
    with caplog.at_level(logging.WARNING):
        assert span_export(os.environ, "service", "1") is None
    (record,) = caplog.records
    assert record.getMessage().startswith("no traces: ")
    assert reason in record.getMessage()


async def test_the_exporter_alone_asks_for_traces_at_the_usual_address(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "console, otlp")
    export = span_export(os.environ, "service", "1")
    assert export is not None
    await export.close()


def spans_made(export: SpanExport, number: int) -> None:
    for _ in range(number):
        export.begin_server_span("call", {}, {}).end()


def wait_until_logged(caplog: pytest.LogCaptureFixture, text: str) -> None:
    wait_until(lambda: any(text in line for line in our_lines(caplog)), 30, f"the log has {text!r}")


def our_lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the log of a service has: pytest sees the lines that are kept from it, too."""
    return [record.getMessage() for record in caplog.records if record.name.startswith("hidream")]


async def test_a_receiver_that_does_not_answer_costs_one_line_and_nothing_waits_for_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "2")
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
        export = span_export(os.environ, "service", "1")
        assert export is not None
        spans_made(export, 1)
        wait_until_logged(caplog, "cannot export traces: Failed to export traces to 127.0.0.1")
        # More than are kept: they are dropped, and no line tells of each.
        start = time.monotonic()
        spans_made(export, 5_000)
        assert time.monotonic() - start < 20
        await export.close()
    first, last = our_lines(caplog)
    assert first.endswith("; trying again")
    assert last == "the last spans were not exported within 1 s"


async def test_a_receiver_that_comes_back_gets_spans_again_and_the_log_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    port = unused_port()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
    caplog.set_level(logging.INFO)
    export = span_export(os.environ, "service", "1")
    assert export is not None
    spans_made(export, 1)
    wait_until_logged(caplog, "cannot export traces: Transient error StatusCode.UNAVAILABLE")
    with trace_receiver(port):
        wait_until_logged(caplog, "can export traces again")
        await export.close()
    assert len(our_lines(caplog)) == 2
