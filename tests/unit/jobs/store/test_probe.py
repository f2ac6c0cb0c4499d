from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any, cast

import pytest
from sqlalchemy.exc import TimeoutError as NoFreeConnectionError

from hidream_grpc.errors import StoreFullError, StoreUnavailableError
from hidream_grpc.jobs.outage_timer import NUM_TICKS
from hidream_grpc.jobs.store.probe import StoreProbe
from hidream_grpc.jobs.store.store import SqlJobStore
from tests.unit.jobs.service_bench import until

OUTAGE_SECONDS = 1234.5
REFUSED = StoreUnavailableError(1.0)


class Timer:
    """Runs when the test says so."""

    def __init__(self, action: Callable[[], None]) -> None:
        self._action = action
        self.is_over = False
        self.is_cancelled = False

    def fire(self) -> None:
        self.is_over = True
        self._action()

    def cancel(self) -> None:
        self.is_cancelled = True


class AskedStore:
    """Answers a probe when the test does."""

    def __init__(self) -> None:
        self.num_probes = 0
        self.in_doubt: list[bool] = []
        self.observe_call: Callable[[str, Exception | None], None] = lambda name, error: None
        self._answered = asyncio.Event()

    async def probe(self, replica_id: str, is_in_doubt: bool) -> None:
        self.in_doubt.append(is_in_doubt)
        self.num_probes += 1
        await self._answered.wait()
        self._answered.clear()
        self.observe_call("probe", None)

    async def answer(self) -> None:
        """Answer the probe, and let the next one come."""
        num_probes = self.num_probes
        self._answered.set()
        await until(lambda: self.num_probes > num_probes)


class Bench:
    def __init__(self, timers: list[Timer]) -> None:
        self.store = AskedStore()
        self.probe = StoreProbe(cast(SqlJobStore, self.store), lambda: "one", OUTAGE_SECONDS, lambda: None)
        self._timers = timers

    def let_the_time_pass(self, num_ticks: int = NUM_TICKS) -> None:
        """The default is so long that whatever runs out does."""
        for _ in range(num_ticks):
            self.timer.fire()

    @property
    def timer(self) -> Timer:
        """The one that runs."""
        (timer,) = (timer for timer in self._timers if not timer.is_cancelled and not timer.is_over)
        return timer


@pytest.fixture
async def bench(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Bench]:
    loop, timers = asyncio.get_running_loop(), list[Timer]()
    call_later = loop.call_later

    def intercepted(delay: float, action: Callable[..., None], *args: Any, **kwargs: Any) -> Any:
        if delay != OUTAGE_SECONDS / NUM_TICKS:
            return call_later(delay, action, *args, **kwargs)
        timers.append(Timer(partial(action, *args)))
        return timers[-1]

    monkeypatch.setattr("hidream_grpc.jobs.store.probe.PROBE_SECONDS", 0.0)
    monkeypatch.setattr(loop, "call_later", intercepted)
    bench = Bench(timers)
    task = asyncio.create_task(bench.probe.run())
    await until(lambda: bench.store.num_probes == 1)
    yield bench
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_a_probe_that_waits_behind_writes_that_succeed_is_no_outage(bench: Bench) -> None:
    before = bench.timer
    bench.store.observe_call("add", None)
    assert before.is_cancelled
    bench.let_the_time_pass()
    assert not bench.probe.is_usable, "what does not answer after that does count"
    bench.store.observe_call("add", None)
    assert bench.probe.is_usable


async def test_a_pause_of_this_process_is_no_outage_of_the_store(bench: Bench) -> None:
    # Whatever the clock says when it wakes: the timer that was due runs, and no other.
    bench.let_the_time_pass(1)
    assert bench.probe.is_usable
    bench.let_the_time_pass(NUM_TICKS - 1)
    assert not bench.probe.is_usable


async def test_that_all_connections_are_in_use_is_no_refusal(bench: Bench) -> None:
    busy = StoreUnavailableError(1.0)
    busy.__cause__ = NoFreeConnectionError()
    bench.store.observe_call("probe", busy)
    before = bench.timer
    bench.store.observe_call("add", None)
    assert before.is_cancelled


@pytest.mark.parametrize("name", ["add", "claim"])
async def test_what_is_refused_again_and_again_is_an_outage_though_all_else_succeeds(
    name: str, bench: Bench
) -> None:
    bench.store.observe_call(name, REFUSED)
    before = bench.timer
    for _ in range(5):
        await bench.store.answer()
        bench.store.observe_call({"add": "claim", "claim": "add"}[name], None)
        bench.store.observe_call(name, REFUSED)
    assert all(bench.store.in_doubt[1:]), "each of these writes something that lasts"
    assert not before.is_cancelled
    bench.let_the_time_pass()
    assert not bench.probe.is_usable
    # Callers are sent elsewhere; probes are all that is left.
    for _ in range(3):
        await bench.store.answer()
    assert bench.probe.is_usable


async def test_a_store_without_room_is_no_outage(bench: Bench) -> None:
    await bench.store.answer()
    before = bench.timer
    bench.store.observe_call("add", StoreFullError(1.0))
    assert before.is_cancelled


async def test_reads_say_nothing_about_writes(bench: Bench) -> None:
    before = bench.timer
    bench.store.observe_call("get", None)
    bench.store.observe_call("get", REFUSED)
    assert not before.is_cancelled
