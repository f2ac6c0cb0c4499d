"""What runs in the background fails in the log, never unseen, and its loops go on."""

from __future__ import annotations

import asyncio
import logging

import pytest

from hidream_grpc.background import BackgroundTasks, Outage, keep_doing
from hidream_grpc.errors import StoreUnavailableError

logger = logging.getLogger("hidream_grpc.test")


@pytest.fixture(autouse=True)
def information(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "hidream_grpc")


async def fail() -> None:
    raise OSError("too many open files")


async def succeed() -> None:
    pass


async def test_a_task_that_fails_is_in_the_log_once_with_its_traceback(
    caplog: pytest.LogCaptureFixture,
) -> None:
    tasks = BackgroundTasks()
    tasks.start(fail(), "watching the ranks")
    await tasks.wait()
    assert caplog.messages == ["watching the ranks failed"]
    assert caplog.records[0].exc_info is not None
    assert isinstance(caplog.records[0].exc_info[1], OSError)
    assert len(tasks) == 0


async def test_a_task_that_ends_well_or_is_cancelled_is_not_in_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    tasks = BackgroundTasks()
    tasks.start(succeed(), "doing it")
    forever = tasks.start(asyncio.Event().wait(), "waiting for ever")
    await tasks.wait(timeout_seconds=0.0)
    tasks.cancel()
    await tasks.wait()
    assert forever.cancelled()
    assert caplog.messages == []


async def test_waiting_for_all_tasks_ends_when_the_time_is_up() -> None:
    tasks = BackgroundTasks()
    forever = tasks.start(asyncio.Event().wait(), "waiting for ever")
    await tasks.wait(timeout_seconds=0.01)
    assert not forever.done()
    assert len(tasks) == 1
    tasks.cancel()


async def test_waiting_for_all_tasks_includes_those_that_they_start() -> None:
    tasks = BackgroundTasks()
    ended = []

    async def end() -> None:
        await asyncio.sleep(0)
        ended.append(True)

    async def start_another() -> None:
        tasks.start(end(), "ending")

    tasks.start(start_another(), "starting another")
    await tasks.wait()
    assert ended == [True]


class Failing:
    """An action that raises these errors, one a call, and then works."""

    def __init__(self, *errors: Exception) -> None:
        self._errors = list(errors)
        self.num_calls = 0
        self.has_worked = asyncio.Event()

    async def __call__(self) -> None:
        self.num_calls += 1
        if self._errors:
            raise self._errors.pop(0)
        self.has_worked.set()


async def run_until_cancelled(loop: asyncio.Task[None], ready: asyncio.Event) -> None:
    await ready.wait()
    # What follows the event in the same turn of the event loop runs first.
    await asyncio.sleep(0)
    loop.cancel()
    await asyncio.wait((loop,))
    assert loop.cancelled()


async def test_a_loop_goes_on_after_any_failure_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    action = Failing(OSError("too many open files"), KeyError("a bug"), StoreUnavailableError(1.0))
    loop = asyncio.create_task(
        keep_doing("look at the ranks", action, lambda: asyncio.sleep(3600), retry_seconds=0.0)
    )
    await run_until_cancelled(loop, action.has_worked)
    assert action.num_calls == 4
    assert caplog.messages == [
        "cannot look at the ranks: too many open files; trying again",
        "can look at the ranks again",
    ]


async def test_a_loop_waits_for_its_pause_after_a_success() -> None:
    action, paused, has_repeated = Failing(), 0, asyncio.Event()

    async def pause() -> None:
        nonlocal paused
        paused += 1
        if action.num_calls == 3:
            has_repeated.set()
            await asyncio.sleep(3600)

    loop = asyncio.create_task(keep_doing("count jobs", action, pause))
    await run_until_cancelled(loop, has_repeated)
    assert (action.num_calls, paused) == (3, 3)


async def test_a_loop_outlives_a_pause_that_fails(caplog: pytest.LogCaptureFixture) -> None:
    try_to_pause = Failing(OSError("no clock"))

    async def pause() -> None:
        await try_to_pause()
        await asyncio.sleep(3600)

    loop = asyncio.create_task(keep_doing("count jobs", Failing(), pause, retry_seconds=0.0))
    await run_until_cancelled(loop, try_to_pause.has_worked)
    assert caplog.messages[:1] == ["cannot count jobs: no clock; trying again"]


def test_however_often_it_fails_the_log_says_it_once_and_why(caplog: pytest.LogCaptureFixture) -> None:
    outage = Outage(logger, "read the queue")
    for _ in range(3):
        outage.note_failure(ValueError("it is gone"))
    assert caplog.messages == ["cannot read the queue: it is gone; trying again"]
    assert caplog.records[0].levelno == logging.WARNING
    assert caplog.records[0].exc_info is not None


def test_an_error_of_ours_is_in_the_log_without_a_traceback_but_with_what_caused_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    error = StoreUnavailableError(1.0)
    error.__cause__ = ConnectionError("connection refused\nIs the server running?")
    Outage(logger, "claim jobs").note_failure(error)
    assert caplog.messages == [
        "cannot claim jobs: the job store does not answer (connection refused); trying again"
    ]
    assert not caplog.records[0].exc_info


def test_an_error_without_a_text_is_named(caplog: pytest.LogCaptureFixture) -> None:
    Outage(logger, "claim jobs").note_failure(TimeoutError())
    assert caplog.messages == ["cannot claim jobs: TimeoutError; trying again"]


def test_when_it_works_again_the_log_says_so_and_the_next_outage_is_news(
    caplog: pytest.LogCaptureFixture,
) -> None:
    outage = Outage(logger, "read the queue")
    outage.note_failure(ValueError("first"))
    for _ in range(3):
        outage.note_success()
    outage.note_failure(ValueError("second"))
    assert caplog.messages == [
        "cannot read the queue: first; trying again",
        "can read the queue again",
        "cannot read the queue: second; trying again",
    ]


def test_what_never_failed_is_not_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    Outage(logger, "read the queue").note_success()
    assert caplog.messages == []


async def test_a_loop_whose_pause_is_over_at_once_leaves_others_their_turn() -> None:
    loop = asyncio.create_task(keep_doing("count jobs", succeed, succeed))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    loop.cancel()
    with pytest.raises(asyncio.CancelledError):
        await loop
