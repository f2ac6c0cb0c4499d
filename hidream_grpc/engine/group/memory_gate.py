"""The gate at which starting ranks wait until it is known that all of them have room."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping

from hidream_grpc.devices.device_types import DeviceMemory
from hidream_grpc.errors import InsufficientMemoryError
from hidream_grpc.model.parallel.layout import Layout

MemoryCheck = Callable[[Layout, Mapping[int, DeviceMemory], DeviceMemory], str | None]
"""Called with a layout, the memory of its ranks' devices and that of the host. Raises InsufficientMemoryError
where the ranks have no room; returns a line for the log where they have little."""

LayoutChoice = Callable[[Layout, DeviceMemory, DeviceMemory], Layout]
"""Called with the layout that a start has begun with, the least memory of its ranks' devices and that of the
host; returns the layout to start with."""


class MemoryGate:
    """Opens once every starting rank has opened its device, or failed to; none has loaded by then.

    Args:
        ranks: the ranks that are starting.
        check: raises InsufficientMemoryError, given the devices of the ranks that have not failed.
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
            rank: one of the starting ranks.
            memory: the memory of its device.

        Raises:
            InsufficientMemoryError: one rank has no room, or all together have none.
        """
        self._devices[rank] = memory
        self._stop_waiting_for(rank)
        await self._is_decided.wait()
        if self._refusal is not None:
            # Each rank raises its own error, since a raised error carries its traceback.
            raise InsufficientMemoryError(str(self._refusal), fits_total=self._refusal.fits_total)

    def leave(self, rank: int) -> None:
        """Stop waiting for a rank, and count it no more unless it has passed; may be called in any state."""
        if not self._is_decided.is_set():
            self._devices.pop(rank, None)
        self._stop_waiting_for(rank)

    def _stop_waiting_for(self, rank: int) -> None:
        self._awaited.discard(rank)
        if self._awaited or self._is_decided.is_set():
            return
        self._is_decided.set()
        try:
            if self._devices:
                self._check(self._devices)
        except InsufficientMemoryError as error:
            self._refusal = error
