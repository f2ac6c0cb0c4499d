"""A call goes on to its end when its caller goes."""

from __future__ import annotations

import asyncio

import pytest

from hidream_grpc.jobs.uninterrupted import RunningCalls

TIMEOUT_SECONDS = 10.0


async def wait_for(event: asyncio.Event, result: int) -> int:
    await event.wait()
    return result


async def test_a_caller_that_stays_gets_the_result_or_the_error() -> None:
    calls, go_on = RunningCalls(), asyncio.Event()
    go_on.set()
    assert await calls.finish(wait_for(go_on, 7)) == 7

    async def fail() -> None:
        raise ValueError("it cannot be done")

    with pytest.raises(ValueError, match="it cannot be done"):
        await calls.finish(fail())


async def test_what_a_caller_that_left_did_not_wait_for_is_done_and_handed_over() -> None:
    calls, go_on, left = RunningCalls(), asyncio.Event(), list[int]()
    caller = asyncio.create_task(calls.finish(wait_for(go_on, 7), if_left=left.append))
    await asyncio.sleep(0)
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    waiting = asyncio.create_task(calls.wait(TIMEOUT_SECONDS))
    await asyncio.sleep(0)
    assert (waiting.done(), left) == (False, [])
    go_on.set()
    await waiting
    assert left == [7]


async def test_a_failure_that_nobody_waits_for_is_handed_to_nobody() -> None:
    calls, go_on, left = RunningCalls(), asyncio.Event(), list[None]()

    async def fail() -> None:
        await go_on.wait()
        raise ValueError("nobody hears this")

    caller = asyncio.create_task(calls.finish(fail(), if_left=left.append))
    await asyncio.sleep(0)
    caller.cancel()
    await asyncio.gather(caller, return_exceptions=True)
    go_on.set()
    await calls.wait(TIMEOUT_SECONDS)
    assert left == []


async def test_a_call_that_does_not_end_is_waited_for_no_longer_than_asked() -> None:
    calls, go_on = RunningCalls(), asyncio.Event()
    caller = asyncio.create_task(calls.finish(wait_for(go_on, 7)))
    await asyncio.sleep(0)
    async with asyncio.timeout(TIMEOUT_SECONDS):
        await calls.wait(0.01)
    assert not caller.done()
    go_on.set()
    assert await caller == 7
