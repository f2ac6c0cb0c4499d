"""Which of OpenTelemetry's variables ask for traces, and what is said of those that cannot be used."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping

import pytest

from hidream.tracing import span_export

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
