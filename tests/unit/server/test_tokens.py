from __future__ import annotations

import errno
import hashlib
import hmac
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hidream_grpc.errors import ConfigurationError
from hidream_grpc.server.tokens import RELOAD_CHECK_SECONDS, TokensFile, caller_of, parse_tokens

ALICE = "alice-has-this-token"
BOB = "bob/has+that~token=="
PATH = Path("tokens")


def sha256(token: str) -> str:
    return f"sha256:{hashlib.sha256(token.encode()).hexdigest()}"


class Clock:
    """Stands still until the test moves it."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "tokens"
    path.write_text(f"alice {ALICE}\n", encoding="utf-8")
    return path


def write(path: Path, text: str) -> None:
    """Replace the file whole, as an operator's tools do."""
    fresh = path.with_name("fresh")
    fresh.write_text(text, encoding="utf-8")
    fresh.replace(path)


def test_a_token_is_that_of_the_caller_on_its_line_written_out_or_as_its_digest() -> None:
    text = f"# who may call\n\nalice {ALICE}\n  bob\t{sha256(BOB)}  \n   # nobody else\n"
    entries = parse_tokens(text, PATH)
    assert [caller_of(entries, token) for token in (ALICE, BOB)] == ["alice", "bob"]
    for stranger in ("", ALICE[:-1], ALICE + "x", ALICE.upper(), sha256(BOB), sha256(ALICE), "alice"):
        assert caller_of(entries, stranger) is None


def test_a_caller_may_have_several_tokens_while_one_replaces_the_other() -> None:
    entries = parse_tokens(f"alice {ALICE}\nalice {BOB}\n", PATH)
    assert [caller_of(entries, token) for token in (ALICE, BOB)] == ["alice", "alice"]


@pytest.mark.parametrize("token", [ALICE, "nobody's"])
def test_every_token_is_compared_in_constant_time_whichever_it_is(
    token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = parse_tokens(f"alice {ALICE}\nbob {BOB}\ncarol {sha256('c')}\n", PATH)
    compared: list[tuple[bytes, bytes]] = []
    compare_digest = hmac.compare_digest

    def noting(first: bytes, second: bytes) -> bool:
        compared.append((first, second))
        return compare_digest(first, second)

    monkeypatch.setattr(hmac, "compare_digest", noting)
    caller_of(entries, token)
    digest = hashlib.sha256(token.encode()).digest()
    assert compared == [(entry.digest, digest) for entry in entries]


SECRET = "the-secret-of-somebody"


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        (f"alice {ALICE}\nalice", 2, "must be a name and a token"),
        (f"alice {SECRET} more", 1, "must be a name and a token"),
        (f"al:ice {SECRET}", 1, "a name is 1 to 64 letters"),
        (f"{'a' * 65} {SECRET}", 1, "a name is 1 to 64 letters"),
        ("# first\n\nalice secret", 3, "a token is at least 16"),
        (f"alice {SECRET}ß", 1, "a token is at least 16"),
        ("alice sha256:secret", 1, "64 hexadecimal digits"),
        (f"alice {SECRET}\nbob {SECRET}", 2, "the token is that of alice already"),
        (f"alice {SECRET}\nbob {sha256(SECRET)}", 2, "the token is that of alice already"),
    ],
)
def test_a_wrong_line_is_told_by_its_number_and_without_the_token(text: str, line: int, words: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        parse_tokens(text, PATH)
    told = str(refused.value)
    assert told.startswith(f"--tokens-file: tokens, line {line}: ")
    assert words in told
    assert "secret" not in told
    assert "\n" not in told


@given(text=st.text())
def test_whatever_a_file_holds_it_is_read_or_refused_in_one_line(text: str) -> None:
    try:
        assert parse_tokens(text, PATH)
    except ConfigurationError as error:
        assert len(str(error).splitlines()) == 1


@pytest.mark.parametrize(
    "content", [None, b"", b"# nobody\n", b"\xff\xfe"], ids=["absent", "empty", "no caller", "no text"]
)
def test_a_file_that_names_nobody_is_refused_with_its_name(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "tokens"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigurationError, match=f"--tokens-file: {path}: "):
        TokensFile(path)


def test_a_token_does_not_show_when_what_holds_it_is_printed(path: Path) -> None:
    (entry,) = parse_tokens(path.read_text(encoding="utf-8"), path)
    shown = f"{entry} {entry!r} {TokensFile(path)!r}"
    assert ALICE not in shown
    assert entry.digest.hex() not in shown
    assert repr(entry.digest) not in shown


def test_a_changed_file_is_read_within_a_second(path: Path, clock: Clock) -> None:
    tokens = TokensFile(path, clock)
    write(path, f"bob {BOB}\n")
    clock.seconds += RELOAD_CHECK_SECONDS / 2
    assert tokens.caller_of(ALICE) == "alice"
    clock.seconds += RELOAD_CHECK_SECONDS / 2
    assert (tokens.caller_of(ALICE), tokens.caller_of(BOB)) == (None, "bob")


def test_a_file_that_is_written_in_place_is_read_too(path: Path, clock: Clock) -> None:
    tokens = TokensFile(path, clock)
    path.write_text(f"bob {BOB}\n", encoding="utf-8")
    clock.seconds += RELOAD_CHECK_SECONDS
    assert tokens.caller_of(BOB) == "bob"


def test_a_link_that_is_turned_to_another_file_is_followed(path: Path, clock: Clock) -> None:
    # As Kubernetes does with a mounted secret.
    link = path.with_name("link")
    link.symlink_to(path)
    tokens = TokensFile(link, clock)
    other = path.with_name("other")
    other.write_text(f"bob {BOB}\n", encoding="utf-8")
    fresh = path.with_name("fresh-link")
    fresh.symlink_to(other)
    fresh.replace(link)
    clock.seconds += RELOAD_CHECK_SECONDS
    assert tokens.caller_of(BOB) == "bob"


def test_a_file_that_did_not_change_is_not_read_again(path: Path, clock: Clock) -> None:
    tokens = TokensFile(path, clock)
    times = path.stat()
    size = len(path.read_bytes())
    path.write_bytes(b"#" * size)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    clock.seconds += RELOAD_CHECK_SECONDS
    assert tokens.caller_of(ALICE) == "alice"


def test_a_file_that_cannot_be_read_for_a_while_is_read_when_it_can_be(
    path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tokens = TokensFile(path, clock)
    write(path, f"bob {BOB}\n")
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", out_of_file_descriptors)
        for _ in range(3):
            clock.seconds += RELOAD_CHECK_SECONDS
            assert tokens.caller_of(ALICE) == "alice"
    assert len(caplog.records) == 1
    clock.seconds += RELOAD_CHECK_SECONDS
    assert (tokens.caller_of(ALICE), tokens.caller_of(BOB)) == (None, "bob")


def out_of_file_descriptors(*_arguments: object, **_options: object) -> str:
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


@pytest.mark.parametrize(
    "text", ["", "bob", f"bob {SECRET} {SECRET}", None], ids=["empty", "half", "wrong", "gone"]
)
def test_a_broken_new_version_changes_nothing_and_is_told_once(
    text: str | None, path: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    tokens = TokensFile(path, clock)
    if text is None:
        path.unlink()
    else:
        write(path, text)
    for _ in range(3):
        clock.seconds += RELOAD_CHECK_SECONDS
        assert tokens.caller_of(ALICE) == "alice"
    (record,) = caplog.records
    assert record.levelname == "ERROR"
    assert str(path) in record.message
    assert SECRET not in record.message
    write(path, f"bob {BOB}\n")
    clock.seconds += RELOAD_CHECK_SECONDS
    assert (tokens.caller_of(ALICE), tokens.caller_of(BOB)) == (None, "bob")


def test_a_file_that_a_pipe_has_replaced_is_told_once_and_not_waited_for(
    path: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    tokens = TokensFile(path, clock)
    path.unlink()
    os.mkfifo(path)
    for _ in range(2):
        clock.seconds += RELOAD_CHECK_SECONDS
        assert tokens.caller_of(ALICE) == "alice"
    assert [record.getMessage() for record in caplog.records] == [
        f"--tokens-file: {path}: is no regular file; the callers stay as they were"
    ]
