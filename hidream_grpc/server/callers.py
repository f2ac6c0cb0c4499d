"""Names the caller of each call: by its bearer token where the operator asks for one, else by its host."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from hidream_grpc.errors import UnauthenticatedError
from hidream_grpc.server.call import Call
from hidream_grpc.server.proxies import FORWARDED_FOR, TrustedProxies, host_of
from hidream_grpc.server.tokens import TokensFile

COMMON_OWNER = ""
"""The owner of all jobs where callers have no tokens."""

_AUTHORIZATION = "authorization"
_SCHEME = "bearer"

Metadata = Iterable[tuple[str, str | bytes]]


class CallerIdentification:
    """Names the callers.

    Without tokens every caller is let through: a host is a caller, and all of them own all jobs.

    Args:
        tokens: the callers that the operator names; None where no token is needed.
        proxies: peers that say for whom they call; None where no peer is believed.
    """

    def __init__(self, tokens: TokensFile | None = None, proxies: TrustedProxies | None = None) -> None:
        self._tokens = tokens
        self._proxies = proxies

    def identify(self, call: Call, metadata: Metadata) -> None:
        """Note in the call who makes it. A call that has begun goes on when its token is taken away.

        Raises:
            UnauthenticatedError: a token is asked for, and none that is known was given.
        """
        metadata = tuple(metadata)
        if self._tokens is not None:
            call.caller = call.owner = _owner_of_token(self._tokens, _values(metadata, _AUTHORIZATION))
            return
        call.owner = COMMON_OWNER
        if self._proxies is None:
            call.caller = host_of(call.peer)
        else:
            call.caller = self._proxies.caller_of(call.peer, _values(metadata, FORWARDED_FOR))


def _values(metadata: Metadata, name: str) -> list[str]:
    return [str(value) for key, value in metadata if key == name]


def _owner_of_token(tokens: TokensFile, given: Sequence[str]) -> str:
    if not given:
        raise UnauthenticatedError("TOKEN_MISSING", "authorization: Bearer <token> is required")
    scheme, _, token = given[0].partition(" ")
    # Of several tokens none is the right one.
    if len(given) > 1 or scheme.lower() != _SCHEME or not token.strip():
        raise UnauthenticatedError("TOKEN_MALFORMED", "authorization must be one Bearer <token>")
    caller = tokens.caller_of(token.strip())
    if caller is None:
        raise UnauthenticatedError("TOKEN_UNKNOWN", "the bearer token is not known")
    return caller
