"""Browsers get the page, programs do not, and nothing from elsewhere runs in it."""

from __future__ import annotations

import httpx

BROWSER = {"Accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}


def test_nothing_but_the_page_itself_may_run_in_it(http: httpx.Client) -> None:
    for path, media_type in (
        ("/", "text/html"),
        ("/page/page.js", "text/javascript"),
        ("/page/page.css", "text/css"),
    ):
        answer = http.get(path, headers=BROWSER)
        assert (answer.status_code, answer.headers["content-type"].partition(";")[0]) == (200, media_type)
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self';")
        assert "unsafe" not in policy

    assert http.get("/page/missing.js").status_code == 404


def test_browsers_and_programs_share_an_address(http: httpx.Client) -> None:
    assert http.get("/", headers=BROWSER).headers["vary"] == "Accept"
    for accept in ("*/*", "application/json", "application/json, text/html;q=0"):
        assert "html" not in http.get("/", headers={"Accept": accept}).headers["content-type"]
