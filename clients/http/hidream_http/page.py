"""The page that browsers get: files that call the contract as REST from there, and nothing else."""

from __future__ import annotations

import re
from pathlib import Path

from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import BaseRoute, Match, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from hidream_http.bridge import Bridge

FILES = Path(__file__).parent / "static"

# Scripts, styles and calls from here alone; images also from memory, where the page keeps what takes a token.
SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' blob:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    # Asked for again each time, and answered from the cache when it is the same.
    "Cache-Control": "no-cache",
}
_REFUSED = re.compile(r";\s*q=0(\.0*)?\s*(;|$)")


def routes(bridge: Bridge) -> list[BaseRoute]:
    """`GET /` for browsers, and the files of the page."""
    return [_ForBrowsers("/", _page, methods=["GET"]), Mount("/page", _Files(directory=FILES))]


class _ForBrowsers(Route):
    """A route for those who ask for HTML by name; programs find what comes after it."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        if scope["type"] == "http" and not _asks_for_html(Request(scope)):
            return Match.NONE, {}
        return super().matches(scope)


class _Files(StaticFiles):
    """Files with the page's headers."""

    def file_response(self, *arguments: object, **options: object) -> Response:
        response = super().file_response(*arguments, **options)  # type: ignore[arg-type]
        response.headers.update(_HEADERS)
        return response


def _asks_for_html(request: Request) -> bool:
    media_types = [part.strip() for accept in request.headers.getlist("accept") for part in accept.split(",")]
    return any(part.startswith("text/html") and not _REFUSED.search(part) for part in media_types)


async def _page(_: Request) -> Response:
    return FileResponse(FILES / "index.html", headers={**_HEADERS, "Vary": "Accept"})
