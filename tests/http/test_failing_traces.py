"""Requests of a bridge whose library of traces fails."""

from __future__ import annotations

import logging

import httpx
import pytest
from starlette.responses import PlainTextResponse

from hidream_http.metrics import Metrics
from hidream_http.observing import Observed
from hidream_http.tracing import Tracing
from tests.support.failing_spans import failing_export


@pytest.mark.parametrize("when", ["start", "end"])
async def test_a_library_of_traces_that_fails_costs_one_line_and_no_request(
    when: str, caplog: pytest.LogCaptureFixture
) -> None:
    class LibraryError(Exception):
        """New to the log."""

    with failing_export(LibraryError("out of order"), when) as export:
        app = Observed(PlainTextResponse("served"), Metrics(), Tracing(export))
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://bridge") as client:
            answers = [await client.get("/v1/server") for _ in range(2)]
    assert [answer.text for answer in answers] == ["served"] * 2
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert warnings == ["a span is lost: LibraryError: out of order (not logged again)"]
