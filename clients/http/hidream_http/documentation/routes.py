"""What the routes of the contract take and answer: as OpenAPI, and as a page where each can be tried."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import BaseRoute, Route
from swagger_ui_bundle import swagger_ui_path

from hidream_http.bridge import Bridge

FILES = Path(__file__).parent

# Nothing from elsewhere; the stylesheet of Swagger UI holds its icons.
SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data: blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    # Asked for again each time, and answered from the cache when it is the same.
    "Cache-Control": "no-cache",
}


def routes(bridge: Bridge) -> list[BaseRoute]:
    """`GET /openapi.json`, and `GET /docs` with the files that it loads."""
    files = {
        "/openapi.json": FILES / "openapi.json",
        "/docs": FILES / "index.html",
        "/docs/start.js": FILES / "start.js",
        "/docs/swagger-ui.css": swagger_ui_path / "swagger-ui.css",
        "/docs/swagger-ui-bundle.js": swagger_ui_path / "swagger-ui-bundle.js",
    }
    return [Route(path, _answer_with(file), methods=["GET"]) for path, file in files.items()]


def _answer_with(file: Path) -> Callable[[Request], Awaitable[Response]]:
    async def answer(_: Request) -> Response:
        return FileResponse(file, headers=_HEADERS)

    return answer
