"""Where ranks that are starting wait until it is known that all of them have room."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping

from hidream_grpc.devices.device_types import DeviceMemory
from hidream_grpc.errors import InsufficientMemoryError
from hidream_grpc.model.parallel.layout import Layout

MemoryCheck = Callable[[Layout, Mapping[int, DeviceMemory], DeviceMemory], str | None]
"""Raises InsufficientMemoryError where ranks of a layout have no room on their devices or the host; returns a
line for the log where they have little."""


class MemoryGate:
    """Opens when every rank that is starting has opened its device, or failed to; none has loaded then.

    Args:
        ranks: that are starting.
        check: of the devices of those that have not failed.
    """

    def __init__(self, ranks: Iterable[int], check: Callable[[Mapping[int, DeviceMemory]], None]) -> None:
        self._awaited = set(ranks)
        self._check = check
        self._devices: dict[int, DeviceMemory] = {}
        self._is_decided = asyncio.Event()
        self._refusal: InsufficientMemoryError | None = None

    async def pass_through(self, rank: int, memory: DeviceMemory) -> None:
        """Wait until this rank may load.

        Args:
            rank: one of those that are starting.
            memory: of its device.

        Raises:
            InsufficientMemoryError: the ranks have no room, together or one of them.
        """
        self._devices[rank] = memory
        self._wait_no_longer_for(rank)
        await self._is_decided.wait()
        if self._refusal is not None:
            # Each rank raises one of its own: tracebacks are part of an error.
            raise InsufficientMemoryError(str(self._refusal), fits_total=self._refusal.fits_total)

    def leave(self, rank: int) -> None:
        """Neither wait for a rank nor count it, unless it has passed; may be called whatever became of it."""
        if not self._is_decided.is_set():
            self._devices.pop(rank, None)
        self._wait_no_longer_for(rank)

    def _wait_no_longer_for(self, rank: int) -> None:
        self._awaited.discard(rank)
        if self._awaited or self._is_decided.is_set():
            return
        self._is_decided.set()
        try:
            if self._devices:
                self._check(self._devices)
        except InsufficientMemoryError as error:
            self._refusal = error
