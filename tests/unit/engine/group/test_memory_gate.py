from __future__ import annotations

import asyncio
from collections.abc import Mapping

from hidream_grpc.devices.device_types import DeviceMemory
from hidream_grpc.engine.group.memory_gate import MemoryGate
from hidream_grpc.errors import InsufficientMemoryError

MEMORY = DeviceMemory(total_bytes=10, free_bytes=5)


class Check:
    def __init__(self, refusal: str = "") -> None:
        self.calls: list[dict[int, DeviceMemory]] = []
        self._refusal = refusal

    def __call__(self, devices: Mapping[int, DeviceMemory]) -> None:
        self.calls.append(dict(devices))
        if self._refusal:
            raise InsufficientMemoryError(self._refusal, fits_total=True)


async def test_no_rank_loads_before_the_last_one_has_opened_its_device_or_failed() -> None:
    gate = MemoryGate(range(3), check := Check())
    waiting = [asyncio.ensure_future(gate.pass_through(rank, MEMORY)) for rank in (0, 2)]
    await asyncio.sleep(0)
    assert not any(task.done() for task in waiting)
    assert check.calls == []
    gate.leave(1)
    await asyncio.gather(*waiting)
    assert check.calls == [{0: MEMORY, 2: MEMORY}]
    # In any state.
    for rank in range(3):
        gate.leave(rank)
    assert len(check.calls) == 1


async def test_all_ranks_are_refused_together() -> None:
    gate = MemoryGate(range(2), Check("no room"))
    refusals = await asyncio.gather(
        *(gate.pass_through(rank, MEMORY) for rank in range(2)), return_exceptions=True
    )
    assert [str(refusal) for refusal in refusals] == ["no room", "no room"]
    assert all(isinstance(refusal, InsufficientMemoryError) and refusal.fits_total for refusal in refusals)


async def test_a_rank_that_died_while_it_waited_is_not_counted() -> None:
    gate = MemoryGate(range(2), check := Check())
    gone = asyncio.ensure_future(gate.pass_through(0, MEMORY))
    await asyncio.sleep(0)
    gone.cancel()
    gate.leave(0)
    await gate.pass_through(1, MEMORY)
    assert check.calls == [{1: MEMORY}]


async def test_where_no_device_was_opened_nothing_is_checked() -> None:
    gate = MemoryGate(range(1), check := Check("no room"))
    gate.leave(0)
    assert check.calls == []
