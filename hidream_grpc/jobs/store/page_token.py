"""Page tokens: opaque texts that say where the next page begins, each for one filter."""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Mapping

import msgspec

from hidream_grpc.errors import FieldViolation, InvalidRequestError
from hidream_grpc.jobs.job import JobState


def encode_page_token(number: int, filter_digest: bytes) -> str:
    """The token of the page after the job with this acceptance number."""
    return base64.urlsafe_b64encode(msgspec.msgpack.encode((number, filter_digest))).decode().rstrip("=")


def decode_page_token(token: str, filter_digest: bytes) -> int:
    """Decode the acceptance number of the last job of the page before.

    Raises:
        InvalidRequestError: this service did not make the token, or made it for another filter.
    """
    try:
        packed = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
        number, digest = msgspec.msgpack.decode(packed, type=tuple[int, bytes])
    except (binascii.Error, ValueError, msgspec.MsgspecError):
        number, digest = 0, b""
    if digest != filter_digest or not 0 < number < 2**63:
        description = "must be the next_page_token of a page with the same states and labels"
        raise InvalidRequestError((FieldViolation("page_token", description),))
    return number


def filter_digest_of(owner: str | None, states: frozenset[JobState], labels: Mapping[str, str]) -> bytes:
    """A digest that differs between filters."""
    content = msgspec.msgpack.encode((owner, sorted(states), sorted(labels.items())))
    return hashlib.sha256(content).digest()[:8]
