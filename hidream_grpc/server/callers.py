"""Names the caller of each call: by token or certificate where the operator asks for it, or by its host."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from hidream import certificate_names
from hidream.certificate_names import FORWARDED_NAME
from hidream_grpc.errors import UnauthenticatedError
from hidream_grpc.server.call import Call
from hidream_grpc.server.proxies import FORWARDED_FOR, TrustedProxies, host_of
from hidream_grpc.server.tokens import TokensFile

COMMON_OWNER = ""
"""The owner of all jobs where callers have no tokens."""

_AUTHORIZATION = "authorization"
_SCHEME = "bearer"

MAX_NAME_CHARACTERS = 256

Metadata = Iterable[tuple[str, str | bytes]]
PeerFacts = Mapping[str, Iterable[bytes]]


class CallerIdentification:
    """Names the callers.

    Without tokens and certificates every caller is let through: a host is a caller, and all of them own all
    jobs.

    Args:
        tokens: the callers that the operator names; None where no token is needed.
        proxies: peers that say for which host they call; None where no peer is believed.
        bridges: peers that say whose certificate they saw; None where no peer is believed.
        have_certificates: whether every connection is one of a caller with a certificate.
    """

    def __init__(
        self,
        tokens: TokensFile | None = None,
        proxies: TrustedProxies | None = None,
        *,
        bridges: TrustedProxies | None = None,
        have_certificates: bool = False,
    ) -> None:
        self._tokens = tokens
        self._proxies = proxies
        self._bridges = bridges
        self._have_certificates = have_certificates

    def identify(self, call: Call, metadata: Metadata, peer_facts: Callable[[], PeerFacts] = dict) -> None:
        """Note in the call who makes it. A call that has begun goes on when its token is taken away.

        Args:
            call: the call.
            metadata: what its caller sent with it.
            peer_facts: what grpc knows of the other end of the connection.

        Raises:
            UnauthenticatedError: a token is asked for, and none that is known was given, or a certificate
                names nobody.
        """
        metadata = tuple(metadata)
        if self._tokens is not None:
            call.caller = call.owner = _owner_of_token(self._tokens, _values(metadata, _AUTHORIZATION))
            return
        if self._bridges is not None and self._bridges.trusts(call.peer):
            names = [value for key, value in metadata if key == FORWARDED_NAME and isinstance(value, bytes)]
            if names:
                # Of several names none is the right one.
                call.caller = call.owner = _usable_name(names[0] if len(names) == 1 else b"")
                return
        if self._have_certificates:
            call.caller = call.owner = name_in_certificate(peer_facts())
            return
        call.owner = COMMON_OWNER
        if self._proxies is None:
            call.caller = host_of(call.peer)
        else:
            call.caller = self._proxies.caller_of(call.peer, _values(metadata, FORWARDED_FOR))


def name_in_certificate(facts: PeerFacts) -> str:
    """The first name of the first kind that the certificate of a peer has: URI, email, DNS name, common name.

    Raises:
        UnauthenticatedError: it has none, or one that is no name for a log.
    """
    return _usable_name(certificate_names.name_in_certificate(facts))


def _usable_name(encoded: bytes) -> str:
    if not encoded:
        description = "the certificate has no URI, email address, DNS name or common name"
        raise UnauthenticatedError("CERTIFICATE_WITHOUT_NAME", description)
    name = encoded.decode("utf-8", "replace")
    # What cannot be decoded must not become the name of somebody else.
    if "\N{REPLACEMENT CHARACTER}" in name or not name.isprintable() or len(name) > MAX_NAME_CHARACTERS:
        description = f"the name in the certificate is not 1 to {MAX_NAME_CHARACTERS} printable characters"
        raise UnauthenticatedError("CERTIFICATE_NAME_UNUSABLE", description)
    return name


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
