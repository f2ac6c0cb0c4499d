"""What the bridge allows: sizes, origins, and how it ends."""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Iterator

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from hidream.v1 import job_pb2
from hidream_http.application import build
from hidream_http.draining import Drain
from hidream_http.settings import Settings
from tests.http.test_streams import ENDLESS_SPEC, EVENT_STREAM, SPEC, sent_events
from tests.support.job_calls import Stub, cancel, running, wait_for_state
from tests.support.live_bridge import LiveBridge, running_bridge
from tests.support.live_server import LiveServer, wait_until

ORIGIN = "https://pages.example"


@pytest.fixture(scope="module")
def narrow(server: LiveServer) -> Iterator[LiveBridge]:
    """A bridge that takes small bodies, and calls of the pages of one origin."""
    with running_bridge(server.address, Settings(max_body_bytes=1000, cors_origins=(ORIGIN,))) as bridge:
        yield bridge


def collected(events: Iterator[dict[str, str]]) -> list[dict[str, str]]:
    """What comes before the connection is broken off."""
    received: list[dict[str, str]] = []
    with pytest.raises(httpx.RemoteProtocolError):
        received.extend(events)
    return received


def access_records(caplog: pytest.LogCaptureFixture, *routes: str) -> list[logging.LogRecord]:
    """The access log's records of some routes: other bridges of this process may still log of others."""
    records = (record for record in caplog.records if record.name == "hidream_http.access")
    return [record for record in records if any(route in record.getMessage() for route in routes)]


def raw_connection(bridge: LiveBridge) -> socket.socket:
    """A connection on which a test sends what no client would."""
    return socket.create_connection(("127.0.0.1", int(bridge.url.rpartition(":")[2])), timeout=60)


def test_a_body_that_is_too_large_is_refused_before_it_is_read(narrow: LiveBridge) -> None:
    with narrow.client() as http:
        headers = {"Content-Type": "application/json"}
        announced = http.post("/v1/jobs", content=b" " * 1001, headers=headers)
        assert announced.status_code == 413
        assert announced.json()["detail"] == "the body is larger than 1000 bytes"
        # What is not too large is read.
        assert http.post("/v1/jobs", content=b" " * 1000, headers=headers).status_code == 400
    with raw_connection(narrow) as connection:
        connection.sendall(
            b"POST /v1/jobs HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        # The body has no end yet, and is not waited for.
        connection.sendall(b"3e9\r\n" + b" " * 1001 + b"\r\n")
        assert connection.makefile("rb").readline().startswith(b"HTTP/1.1 413 ")


def test_a_head_without_end_is_not_kept(narrow: LiveBridge) -> None:
    with raw_connection(narrow) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: a\r\nX-Endless: ")
        with pytest.raises(ConnectionError):
            # Far more than the buffers of both ends hold.
            for _ in range(1000):
                connection.sendall(b"a" * 65_536)


def test_pages_of_other_origins_may_call_where_the_operator_says_so(
    narrow: LiveBridge, http: httpx.Client
) -> None:
    asking = {
        "Origin": ORIGIN,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type,last-event-id",
    }
    with narrow.client() as allowed:
        assert allowed.options("/v1/jobs", headers=asking).headers["access-control-allow-origin"] == ORIGIN
        answer = allowed.get("/v1/server", headers={"Origin": ORIGIN})
        assert answer.headers["access-control-allow-origin"] == ORIGIN
        other = allowed.get("/v1/server", headers={"Origin": "https://other.example"})
        assert "access-control-allow-origin" not in other.headers
    assert "access-control-allow-origin" not in http.get("/v1/server", headers={"Origin": ORIGIN}).headers
    assert http.options("/v1/jobs", headers=asking).status_code == 405


def test_a_server_that_is_not_there_is_a_problem_to_try_again() -> None:
    with running_bridge("127.0.0.1:1") as bridge, bridge.client() as http:
        for answer in (http.get("/v1/server"), http.post("/v1/generate", json={"spec": SPEC})):
            assert (answer.status_code, answer.json()["code"]) == (503, "UNAVAILABLE")
            assert (answer.headers["retry-after"], answer.json()["detail"]) == (
                "1",
                "the server does not answer",
            )
            assert answer.headers["content-type"] == "application/problem+json"


def test_requests_are_counted_and_logged(server: LiveServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "hidream_http.access")
    with running_bridge(server.address) as bridge, bridge.client() as http:
        http.get("/v1/jobs/some-job")
        http.get("/nowhere/at/all")
        http.request("BREW" * 50, "/v1/server")
        text = http.get("/metrics").text
    assert 'hidream_http_requests_total{method="GET",route="/v1/jobs/{job_id}",status="404"} 1.0' in text
    assert 'hidream_http_requests_total{method="GET",route="",status="404"} 1.0' in text
    assert 'hidream_http_requests_total{method="_OTHER",route="/v1/server",status="405"} 1.0' in text
    assert "BREW" not in text
    assert "hidream_http_running_requests 0.0" in text
    records = access_records(caplog, "/v1/jobs/{job_id} 404", "(no route)", "_OTHER", "/metrics")
    assert [record.getMessage() for record in records] == [
        "GET /v1/jobs/{job_id} 404",
        "GET (no route) 404",
        "_OTHER /v1/server 405",
    ]
    assert getattr(records[0], "job_id") == "some-job"  # noqa: B009  (a fact of ours)


async def test_a_failure_of_the_bridge_is_counted_and_logged_as_one(caplog: pytest.LogCaptureFixture) -> None:
    async def fail(_: Request) -> Response:
        raise RuntimeError("a fault of the bridge")

    caplog.set_level(logging.INFO, "hidream_http.access")
    application = build(Settings(), Drain())
    application.router.routes.insert(0, Route("/failing", fail))
    transport = httpx.ASGITransport(application, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://bridge") as http:
        failed = await http.get("/failing")
        text = (await http.get("/metrics")).text
    assert (failed.status_code, failed.headers["content-type"]) == (500, "application/problem+json")
    assert 'hidream_http_requests_total{method="GET",route="/failing",status="500"} 1.0' in text
    [record] = access_records(caplog, "/failing", "/metrics")
    assert record.getMessage() == "GET /failing 500"


def test_the_bridge_lets_running_requests_end(server: LiveServer, stub: Stub) -> None:
    job_id = running(stub)
    with running_bridge(server.address) as bridge, bridge.client() as http:
        with http.stream("GET", f"/v1/jobs/{job_id}/events", headers=EVENT_STREAM) as answer:
            watched = sent_events(answer.iter_lines())
            next(watched)
            bridge.stop()
            wait_until(lambda: http.get("/readyz").status_code == 503, 10, "it says that it drains")
            refused = http.get("/v1/server")
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
            cancel(stub, job_id)
            last = [json.loads(event["data"]) for event in watched][-1]
        bridge.wait_until_ended()
    assert "cancelled" in last["event"]


def test_a_watch_without_end_does_not_hold_the_bridge_up(server: LiveServer) -> None:
    with (
        running_bridge(server.address, Settings(drain_seconds=600)) as bridge,
        bridge.client() as http,
        http.stream("GET", "/v1/jobs:watch?labels[test]=nobody", headers=EVENT_STREAM) as answer,
    ):
        bridge.stop()
        [last] = collected(sent_events(answer.iter_lines()))
        bridge.wait_until_ended()
    assert (last["event"], json.loads(last["data"])["status"], last["retry"]) == ("problem", 503, "1000")


def test_streams_that_outlast_the_drain_are_told(server: LiveServer, stub: Stub) -> None:
    with (
        running_bridge(server.address, Settings(drain_seconds=0.1)) as bridge,
        bridge.client() as http,
        pytest.raises(httpx.RemoteProtocolError),
        http.stream("POST", "/v1/generate", json={"spec": ENDLESS_SPEC}, headers=EVENT_STREAM) as answer,
    ):
        received: list[dict[str, str]] = []
        for event in sent_events(answer.iter_lines()):
            if not received:
                bridge.stop()
            received.append(event)
    bridge.wait_until_ended()
    assert received[-1]["event"] == "problem"
    assert json.loads(received[-1]["data"])["status"] == 503
    # As for any caller that leaves.
    wait_for_state(stub, json.loads(received[0]["data"])["jobId"], job_pb2.JOB_STATE_CANCELLED)
