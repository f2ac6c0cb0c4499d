"""The callers that a file of bearer tokens names; the file is read again when it changes.

    # one caller a line: its name, and its token or the SHA-256 of it
    alice  3q2-7wEAAAC1vQ_nzA9f
    robot  sha256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08

A name may have several lines, so that a token can be replaced while the old one still works; a token has
one name. Only the digests are kept in memory.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from hidream_grpc.errors import ConfigurationError
from hidream_grpc.server.operator_files import read_operator_file, version_of

logger = logging.getLogger(__name__)

TOKENS_FILE_FLAG = "--tokens-file"
RELOAD_CHECK_SECONDS = 1.0
MIN_TOKEN_CHARACTERS = 16

_DIGEST_PREFIX = "sha256:"
# Without a colon no name can be taken for the address of a caller without a token.
_NAME = re.compile(r"[A-Za-z0-9._@-]{1,64}")
# RFC 6750, section 2.1: what a bearer token consists of.
_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]+=*")
_SHA256 = re.compile(r"[0-9A-Fa-f]{64}")


@dataclass(frozen=True, slots=True)
class CallerToken:
    """A caller, and the SHA-256 of one of its tokens."""

    name: str
    digest: bytes = field(repr=False)


def parse_tokens(text: str, path: Path) -> tuple[CallerToken, ...]:
    """Read the lines of a tokens file.

    Raises:
        ConfigurationError: names the file and the line that is wrong, and never what a token is.
    """
    entries: dict[bytes, CallerToken] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if len(words) != 2:
            raise _refused(path, number, "must be a name and a token")
        name, token = words
        if not _NAME.fullmatch(name):
            raise _refused(path, number, "a name is 1 to 64 letters, digits and . _ @ -")
        digest = _digest(token, path, number)
        if digest in entries:
            raise _refused(path, number, f"the token is that of {entries[digest].name} already")
        entries[digest] = CallerToken(name, digest)
    if not entries:
        raise ConfigurationError(TOKENS_FILE_FLAG, f"{path}: names no caller")
    return tuple(entries.values())


def caller_of(entries: tuple[CallerToken, ...], token: str) -> str | None:
    """The name of the caller whose token it is; takes equally long for every token."""
    digest = hashlib.sha256(token.encode()).digest()
    # A search that ended at a hit would let its duration show where that is in the file.
    hits = [entry.name for entry in entries if hmac.compare_digest(entry.digest, digest)]
    return hits[0] if hits else None


class TokensFile:
    """The callers that a file names, as it is now.

    A version that is wrong or cannot be read changes nothing: the log says so once, and the callers
    before it stay. The file is small and read by the thread that asks.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        """Read the file.

        Raises:
            ConfigurationError: in one line, what is wrong with it.
        """
        self._path = path
        self._clock = clock
        self._version = version_of(self._path)
        self._unreadable_reason: str | None = None
        self._entries = parse_tokens(self._text(), path)
        self._next_check_time = clock() + RELOAD_CHECK_SECONDS

    def caller_of(self, token: str) -> str | None:
        """The name of the caller whose token it is, or None.

        What it knows of the file is at most RELOAD_CHECK_SECONDS old.
        """
        if self._clock() >= self._next_check_time:
            self._next_check_time = self._clock() + RELOAD_CHECK_SECONDS
            self._reload()
        return caller_of(self._entries, token)

    def _reload(self) -> None:
        version = version_of(self._path)
        if version == self._version:
            self._unreadable_reason = None
            return
        try:
            text = self._text()
        except ConfigurationError as error:
            # Tried again at every check: whatever keeps it from being read need not change the file.
            if str(error) != self._unreadable_reason:
                logger.error("%s; the callers stay as they were", error)
            self._unreadable_reason = str(error)
            return
        self._unreadable_reason = None
        # Taken before the file is read: a change meanwhile is seen at the next check.
        self._version = version
        try:
            self._entries = parse_tokens(text, self._path)
        except ConfigurationError as error:
            logger.error("%s; the callers stay as they were", error)
        else:
            num_callers = len({entry.name for entry in self._entries})
            logger.info("%s: %d callers", self._path, num_callers)

    def _text(self) -> str:
        try:
            return read_operator_file(TOKENS_FILE_FLAG, self._path).decode()
        except UnicodeDecodeError:
            raise ConfigurationError(TOKENS_FILE_FLAG, f"{self._path}: is not UTF-8") from None


def _digest(token: str, path: Path, number: int) -> bytes:
    if token.startswith(_DIGEST_PREFIX):
        digest = token.removeprefix(_DIGEST_PREFIX)
        if not _SHA256.fullmatch(digest):
            raise _refused(path, number, f"{_DIGEST_PREFIX} is followed by 64 hexadecimal digits")
        return bytes.fromhex(digest)
    if len(token) < MIN_TOKEN_CHARACTERS or not _TOKEN.fullmatch(token):
        description = (
            f"a token is at least {MIN_TOKEN_CHARACTERS} letters, digits and . _ ~ + / -, then any ="
        )
        raise _refused(path, number, description)
    return hashlib.sha256(token.encode()).digest()


def _refused(path: Path, number: int, reason: str) -> ConfigurationError:
    return ConfigurationError(TOKENS_FILE_FLAG, f"{path}, line {number}: {reason}")
