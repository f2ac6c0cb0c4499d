"""The contract's methods over HTTP: proto3 JSON in and out, and nothing that is dropped."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from google.protobuf import json_format

from hidream.v1 import job_pb2, server_info_pb2
from tests.support.job_calls import Stub, drawn, get
from tests.support.live_server import LiveServer

SPEC = {"prompt": "a red circle", "width": 64, "height": 64, "numInferenceSteps": 1}


def violations(refused: httpx.Response) -> dict[str, str]:
    """The fields that an answer names, with what it says of them."""
    assert refused.status_code == 400, refused.text
    assert refused.headers["content-type"] == "application/problem+json"
    assert refused.json()["code"] == "INVALID_ARGUMENT"
    return {one["field"]: one["description"] for one in refused.json()["violations"]}


def test_a_job_is_submitted_listed_cancelled_and_deleted(http: httpx.Client, stub: Stub) -> None:
    label = {"test": "rest"}
    submitted = http.post("/v1/jobs", json={"spec": SPEC, "labels": label})
    assert submitted.status_code == 200, submitted.text
    job = json_format.ParseDict(submitted.json(), job_pb2.Job())
    assert job.spec == get(stub, job.job_id).spec

    batch = http.post("/v1/jobs:batch", json={"requests": [{"spec": SPEC, "labels": label}]})
    ids = {job.job_id, batch.json()["jobs"][0]["jobId"]}
    listed = http.get("/v1/jobs", params={"labels[test]": "rest", "page_size": "1"}).json()
    rest = http.get("/v1/jobs", params={"labels[test]": "rest", "pageToken": listed["nextPageToken"]}).json()
    assert {one["jobId"] for one in (*listed["jobs"], *rest["jobs"])} == ids

    for job_id in ids:
        assert http.post(f"/v1/jobs/{job_id}:cancel").status_code == 200
        assert http.get(f"/v1/jobs/{job_id}/events").status_code == 200
        deleted = http.delete(f"/v1/jobs/{job_id}")
        assert (deleted.status_code, deleted.json()) == (200, {})
    gone = http.get(f"/v1/jobs/{job.job_id}")
    assert gone.status_code == 404
    assert gone.json()["code"] == "NOT_FOUND"
    assert gone.json()["details"][0]["resourceName"] == job.job_id


def test_jobs_are_listed_by_several_states(http: httpx.Client, stub: Stub) -> None:
    job = drawn(stub, prompt="a red circle")
    for states in (["JOB_STATE_SUCCEEDED", "JOB_STATE_FAILED"], ["3"]):
        jobs = http.get("/v1/jobs", params={"states": states}).json()["jobs"]
        assert job.job_id in {one["jobId"] for one in jobs}
        assert {one["state"] for one in jobs} <= {"JOB_STATE_SUCCEEDED", "JOB_STATE_FAILED"}


def test_the_server_describes_itself_as_in_grpc(http: httpx.Client, server: LiveServer) -> None:
    answer = http.get("/v1/server")
    assert answer.headers["content-type"] == "application/json"
    info = json_format.ParseDict(answer.json(), server_info_pb2.ServerInfo())
    assert info.limits == server.info().limits


@pytest.mark.parametrize(
    ("document", "bad"),
    [
        pytest.param(
            {"spec": {"prompt": "x", "witdh": 64, "height": "tall"}, "colour": 1, "priority": "PRIORITY_TOP"},
            {
                "spec.witdh": "did you mean width",
                "spec.height": '"tall"',
                "colour": "no field of",
                "priority": "PRIORITY_LOW",
            },
            id="unknown names and values, all at once",
        ),
        pytest.param(
            {"spec": {"seed": -1}},
            {"spec.prompt": "", "spec.seed": ""},
            id="what the server refuses",
        ),
        pytest.param(
            {"spec": {"width": 1, "prompt": 7}}, {"spec.prompt": "7 is not a string"}, id="a number for text"
        ),
        pytest.param(
            {"spec": [], "labels": {"a": 1}},
            {"spec": "an object", "labels": "an object of strings"},
            id="shapes",
        ),
        pytest.param(
            {"request_id": "a", "requestId": "b"}, {"request_id": "by both of its names"}, id="both names"
        ),
    ],
)
def test_every_wrong_field_of_a_body_is_named(
    document: dict[str, Any], bad: dict[str, str], http: httpx.Client
) -> None:
    found = violations(http.post("/v1/jobs", json=document))
    assert found.keys() == bad.keys()
    for field, text in bad.items():
        assert text in found[field]


def test_wrong_fields_of_a_batch_are_named_by_their_place(http: httpx.Client) -> None:
    requests = [{"spec": SPEC}, {"spec": {**SPEC, "colour": 1}}, 3]
    assert violations(http.post("/v1/jobs:batch", json={"requests": requests})).keys() == {
        "requests[1].spec.colour",
        "requests[2]",
    }


@pytest.mark.parametrize(
    ("query", "bad"),
    [
        ("page_sise=1&state=3", {"page_sise": "did you mean page_size", "state": "did you mean states"}),
        ("page_size=many&states=HAPPY", {"page_size": "integer", "states[0]": "JOB_STATE_QUEUED"}),
        ("page_size=1&page_size=2", {"page_size": "twice"}),
        ("labels=a", {"labels": "labels[KEY]=VALUE"}),
        ("labels[a]=1&labels[a]=2", {"labels[a]": "twice"}),
        ("page_size.x=1", {"page_size.x": "has no fields"}),
    ],
)
def test_every_wrong_query_parameter_is_named(query: str, bad: dict[str, str], http: httpx.Client) -> None:
    found = violations(http.get(f"/v1/jobs?{query}"))
    assert found.keys() == bad.keys()
    for name, text in bad.items():
        assert text in found[name]


def test_what_stands_in_the_path_or_the_body_is_not_given_again(http: httpx.Client) -> None:
    assert violations(http.get("/v1/jobs/a?job_id=b")).keys() == {"job_id"}
    assert violations(http.post("/v1/jobs/a:cancel", json={"jobId": "b"})).keys() == {"job_id"}
    assert violations(http.post("/v1/jobs?request_id=a", json={"spec": SPEC})).keys() == {"request_id"}
    assert "takes no body" in violations(http.request("GET", "/v1/jobs", content=b"{}"))[""]


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"[]",
        b"\xff",
        b'{"spec": NaN}',
        b'{"spec": {}, "spec": {}}',
        b'{"preview": "\\ud800"}',
    ],
)
def test_a_body_that_is_no_json_object_is_refused(body: bytes, http: httpx.Client) -> None:
    refused = http.post("/v1/jobs", content=body, headers={"Content-Type": "application/json"})
    assert violations(refused)


@pytest.mark.parametrize("depth", [60, 900, 100_000])
def test_a_body_that_is_nested_too_deep_is_refused_as_such(depth: int, http: httpx.Client) -> None:
    body = b'{"spec": ' + b"[" * depth + b"]" * depth + b"}"
    refused = http.post("/v1/jobs", content=body, headers={"Content-Type": "application/json"})
    assert violations(refused) == {"": "the body is nested deeper than 50 levels"}


def test_a_form_of_another_site_cannot_submit_jobs(http: httpx.Client) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        refused = http.post("/v1/jobs", content=b'{"spec": {"prompt": "x"}}', headers={"Content-Type": kind})
        assert refused.status_code == 415


def test_other_methods_of_a_path_are_refused(http: httpx.Client) -> None:
    refused = http.put("/v1/server")
    assert (refused.status_code, refused.headers["content-type"]) == (405, "application/problem+json")
    # A stream that nobody could read.
    assert http.head("/v1/jobs:watch").status_code == 405


def test_a_call_may_have_a_deadline(http: httpx.Client) -> None:
    late = http.post(
        "/v1/generate",
        json={"spec": {**SPEC, "numInferenceSteps": 50}},
        headers={"Request-Timeout": "0.001"},
    )
    assert late.status_code == 504, late.text
    assert late.json()["code"] == "DEADLINE_EXCEEDED"
    for wrong in ("soon", "0", "-1", "nan", "inf"):
        refused = http.get("/v1/server", headers={"Request-Timeout": wrong})
        assert violations(refused).keys() == {"Request-Timeout"}


def test_the_server_is_told_for_whom_the_bridge_calls(http: httpx.Client, server: LiveServer) -> None:
    num_lines = len(server.log_lines)
    http.get("/v1/jobs/of-another-host", headers={"X-Forwarded-For": "203.0.113.9"})
    server.logged_lines("GetJob NOT_FOUND", "caller=ipv4:203.0.113.9", after=num_lines)
    bad = violations(http.get("/v1/jobs", headers={b"Authorization": b"Bearer \xfc"}))
    assert bad.keys() == {"authorization"}
