"""The OpenAPI document says what the bridge does, and the page that shows it needs nothing from elsewhere."""

from __future__ import annotations

import re
from urllib.parse import urljoin

import httpx
from openapi_schema_validator import OAS30Validator
from openapi_spec_validator import validate
from playwright.sync_api import expect

from hidream_http.transcoding.methods import http_methods
from hidream_http.transcoding.routes import SERVICE
from tests.http.visitors import new_context, visiting
from tests.support.chromium import running_chromium
from tests.support.live_bridge import LiveBridge


def routes_of(document: dict[str, dict[str, dict[str, object]]]) -> set[tuple[str, str]]:
    """Verb and path of each operation, with the fields in the path as the contract has them."""
    found = ((verb.upper(), path) for path, operations in document["paths"].items() for verb in operations)
    return {(verb, re.sub(r"[A-Z]", lambda match: f"_{match[0].lower()}", path)) for verb, path in found}


def test_the_document_is_openapi_and_has_every_route_of_the_contract(http: httpx.Client) -> None:
    answer = http.get("/openapi.json")
    assert answer.headers["content-type"] == "application/json"
    document = answer.json()
    validate(document)
    assert routes_of(document) == {(method.verb, method.path) for method in http_methods(SERVICE)}


def test_answers_and_problems_are_what_the_document_says(http: httpx.Client) -> None:
    document = http.get("/openapi.json").json()

    def check(name: str, answer: httpx.Response) -> None:
        schema = {**document["components"]["schemas"][name], "additionalProperties": False}
        OAS30Validator({**schema, "components": document["components"]}).validate(answer.json())

    check("ServerInfo", http.get("/v1/server"))
    asked = {"spec": {"prompt": "a red circle", "width": 64, "height": 64, "numInferenceSteps": 1}}
    submitted = http.post("/v1/jobs", json=asked)
    check("Job", submitted)
    job_path = f"/v1/jobs/{submitted.json()['jobId']}"
    check("Job", http.post(f"{job_path}:cancel"))
    refused = http.post("/v1/jobs", json={"spec": {"prompt": "", "width": 63}})
    assert refused.status_code == 400
    check("Problem", refused)
    operation = document["paths"]["/v1/jobs/{jobId}/events"]["get"]
    for media_type in operation["responses"]["200"]["content"]:
        streamed = http.get(f"{job_path}/events", headers={"Accept": media_type})
        assert streamed.headers["content-type"].partition(";")[0] == media_type


def test_the_page_of_the_routes_and_its_files_come_from_the_bridge_alone(http: httpx.Client) -> None:
    page = http.get("/docs")
    policy = page.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self';")
    assert "unsafe" not in policy
    addresses = re.findall(r"""(?:src|href)="([^"]+)\"""", page.text)
    files = [address for address in addresses if address != "data:,"]
    assert len(files) == 3
    for address in files:
        assert address.startswith("/docs/")
        assert http.get(urljoin("/docs", address)).status_code == 200


def test_a_person_tries_a_route_on_the_page_and_nothing_is_loaded_from_elsewhere(bridge: LiveBridge) -> None:
    asked: list[str] = []
    with running_chromium() as browser, new_context(browser) as context:
        context.on("request", lambda request: asked.append(request.url))
        with visiting(context, f"{bridge.url}/docs") as visitor:
            page = visitor.page
            expect(page.locator(".opblock")).to_have_count(len(list(http_methods(SERVICE))))
            server = page.locator(".opblock", has_text="/v1/server")
            server.locator(".opblock-summary").click()
            server.get_by_role("button", name="Try it out").click()
            server.get_by_role("button", name="Execute").click()
            expect(server.locator(".live-responses-table tbody")).to_contain_text("maxNumImages")
    assert f"{bridge.url}/v1/server" in asked
    elsewhere = [url for url in asked if not url.startswith((f"{bridge.url}/", "data:"))]
    assert elsewhere == []
