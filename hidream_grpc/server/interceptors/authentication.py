"""Finds out who calls, by the bearer token where the operator asks for one."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import grpc
import grpc.aio

from hidream_grpc.errors import UnauthenticatedError
from hidream_grpc.server.call import current_call
from hidream_grpc.server.interceptors.handlers import (
    OUR_METHODS,
    Context,
    Continuation,
    Handler,
    wrap_handler,
)

COMMON_OWNER = ""
"""Owns all jobs where nobody says who they are."""

_METADATA_KEY = "authorization"
_SCHEME = "bearer"

IdentifyToken = Callable[[str], str | None]


class AuthenticationInterceptor(grpc.aio.ServerInterceptor):
    """Lets known callers through, and notes who they are in the call (`server/call.py`).

    Without tokens everybody is let through: a host is a caller, and all of them own all jobs. A call
    that has begun goes on when its token is taken away.
    """

    def __init__(self, identify: IdentifyToken | None) -> None:
        """identify tells whose token it is, None for nobody's; it is None where no token is asked for."""
        self._identify = identify

    async def intercept_service(
        self, continuation: Continuation, details: grpc.HandlerCallDetails
    ) -> Handler | None:
        """Wrap our own methods only: health and reflection are for everybody."""
        handler = await continuation(details)
        if handler is None or not details.method.startswith(OUR_METHODS):
            return handler
        return wrap_handler(handler, self._authenticated)

    @asynccontextmanager
    async def _authenticated(self, context: Context) -> AsyncIterator[None]:
        call = current_call()
        if self._identify is None:
            call.caller, call.owner = host_of(call.peer), COMMON_OWNER
        else:
            call.caller = call.owner = _known_caller(context, self._identify)
        yield


def _known_caller(context: Context, identify: IdentifyToken) -> str:
    given = [value for key, value in context.invocation_metadata() or () if key == _METADATA_KEY]
    if not given:
        raise UnauthenticatedError("TOKEN_MISSING", "authorization: Bearer <token> is required")
    scheme, _, token = str(given[0]).partition(" ")
    # Of several, none is more the caller's than the others.
    if len(given) > 1 or scheme.lower() != _SCHEME or not token.strip():
        raise UnauthenticatedError("TOKEN_MALFORMED", "authorization must be one Bearer <token>")
    caller = identify(token.strip())
    if caller is None:
        raise UnauthenticatedError("TOKEN_UNKNOWN", "the bearer token is not known")
    return caller


def host_of(peer: str) -> str:
    """The peer's address without its port, so that one host is one caller."""
    scheme, _, address = peer.partition(":")
    return f"{scheme}:{address.rpartition(':')[0] or address}"
