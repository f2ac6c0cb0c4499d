"""Open streams: how many there are, of all callers and of each, and the messages that many of them send."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary

from hidream_grpc.errors import CallerStreamLimitError, TooManyReadersError

Content = TypeVar("Content")
Message = TypeVar("Message")


class OpenStreams:
    """Counts the open streams of a server, and refuses those beyond its limits.

    Args:
        max_streams: streams of all callers together.
        max_streams_per_caller: streams of one caller; None where only max_streams counts.
    """

    def __init__(self, max_streams: int, max_streams_per_caller: int | None) -> None:
        self._max_streams = max_streams
        self._max_streams_per_caller = max_streams_per_caller
        self._num_streams: Counter[str] = Counter()

    @property
    def callers(self) -> frozenset[str]:
        """The callers that have a stream open."""
        return frozenset(self._num_streams)

    @contextmanager
    def opened(self, caller: str, retry_after_seconds: float) -> Iterator[None]:
        """Count one stream of this caller until the block ends.

        Raises:
            CallerStreamLimitError: this caller has as many open as it may.
            TooManyReadersError: all callers together have.
        """
        limit = self._max_streams_per_caller
        if limit is not None and self._num_streams[caller] >= limit:
            raise CallerStreamLimitError(caller, limit, retry_after_seconds)
        if self._num_streams.total() >= self._max_streams:
            raise TooManyReadersError(self._max_streams, retry_after_seconds)
        self._num_streams[caller] += 1
        try:
            yield
        finally:
            self._num_streams[caller] -= 1
            if not self._num_streams[caller]:
                del self._num_streams[caller]


class SharedMessages(Generic[Content, Message]):
    """Makes the message of each content once, for all streams that send it.

    Args:
        make: makes a message; of a content that several streams hold it is called once.
    """

    def __init__(self, make: Callable[[Content], Coroutine[Any, Any, Message]]) -> None:
        self._make = make
        # A message is forgotten with the last stream that is still to send it.
        self._messages: WeakKeyDictionary[Content, asyncio.Task[Message]] = WeakKeyDictionary()

    async def of(self, content: Content) -> Message:
        """The message of a content, which is hashed by its identity."""
        task = self._messages.get(content)
        if task is None:
            task = self._messages[content] = asyncio.create_task(self._make(content))
        # The stream that asked first may end before the others.
        return task.result() if task.done() else await asyncio.shield(task)
