from __future__ import annotations

import asyncio
from contextlib import AbstractContextManager, ExitStack

import pytest

from hidream_grpc.errors import CallerStreamLimitError, TooManyReadersError
from hidream_grpc.server.streams import OpenStreams, SharedMessages

RETRY_AFTER_SECONDS = 1.5


def opened(streams: OpenStreams, caller: str) -> AbstractContextManager[None]:
    return streams.opened(caller, RETRY_AFTER_SECONDS)


def test_a_caller_at_its_limit_is_refused_with_its_name_and_others_are_not() -> None:
    streams = OpenStreams(max_streams=10, max_streams_per_caller=2)
    with opened(streams, "alice"), opened(streams, "alice"):
        with pytest.raises(CallerStreamLimitError) as refused, opened(streams, "alice"):
            pass
        with opened(streams, "bob"), opened(streams, "bob"):
            pass
    error = refused.value
    assert (error.caller, error.max_streams_per_caller, error.retry_after_seconds) == ("alice", 2, 1.5)


def test_a_closed_stream_makes_room_for_exactly_one() -> None:
    streams = OpenStreams(max_streams=10, max_streams_per_caller=2)
    with opened(streams, "alice"):
        with opened(streams, "alice"):
            pass
        with opened(streams, "alice"), pytest.raises(CallerStreamLimitError), opened(streams, "alice"):
            pass


def test_however_a_stream_ends_its_caller_is_forgotten_with_its_last_one() -> None:
    streams = OpenStreams(max_streams=10, max_streams_per_caller=1)
    with pytest.raises(ZeroDivisionError), opened(streams, "alice"), opened(streams, "bob"):
        assert streams.callers == {"alice", "bob"}
        raise ZeroDivisionError
    with opened(streams, "carol"), pytest.raises(CallerStreamLimitError), opened(streams, "carol"):
        pass
    assert streams.callers == frozenset()


def test_a_refused_caller_that_has_no_stream_is_not_remembered() -> None:
    streams = OpenStreams(max_streams=1, max_streams_per_caller=1)
    with opened(streams, "alice"):
        with pytest.raises(TooManyReadersError), opened(streams, "bob"):
            pass
        assert streams.callers == {"alice"}


@pytest.mark.parametrize("max_streams_per_caller", [None, 200], ids=["no limit of a caller", "a larger one"])
def test_all_streams_count_where_the_limit_of_a_caller_is_larger_or_absent(
    max_streams_per_caller: int | None,
) -> None:
    streams = OpenStreams(3, max_streams_per_caller)
    with ExitStack() as stack:
        for caller in ("alice", "alice", "bob"):
            stack.enter_context(opened(streams, caller))
        with pytest.raises(TooManyReadersError) as refused:
            stack.enter_context(opened(streams, "alice"))
    assert (refused.value.max_streams, refused.value.retry_after_seconds) == (3, 1.5)


class Content:
    """Hashed by its identity, and forgotten when no stream holds it."""


async def test_a_message_that_many_streams_send_is_made_once_also_when_the_first_of_them_ends() -> None:
    made: list[int] = []
    may_make = asyncio.Event()

    async def make(content: Content) -> str:
        made.append(id(content))
        await may_make.wait()
        return f"message {len(made)}"

    messages: SharedMessages[Content, str] = SharedMessages(make)
    content, other = Content(), Content()
    first = asyncio.create_task(messages.of(content))
    await asyncio.sleep(0)
    sending = [asyncio.create_task(messages.of(content)) for _ in range(50)]
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    may_make.set()
    assert set(await asyncio.gather(*sending)) == {"message 1"}
    assert await messages.of(content) == "message 1"
    assert await messages.of(other) == "message 2"
    assert made == [id(content), id(other)]
