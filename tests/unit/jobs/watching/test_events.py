from __future__ import annotations

import asyncio
import gc
import weakref
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hidream_grpc.errors import JobCancelledError
from hidream_grpc.jobs.job import CancelReason, Execution, JobState, Progress, StoredImage
from hidream_grpc.jobs.watching.events import (
    Body,
    Cancelled,
    ImagePart,
    JobEvent,
    JobFeed,
    Previewed,
    Progressed,
    Queued,
    Restarted,
    Started,
)
from tests.support.job_stores import new_job

END = Cancelled(CancelReason.REQUESTED, JobCancelledError("j"))


JOB = new_job()


def image(index: int, size_bytes: int, chunk_bytes: int = 1000, first_sequence: int = 1) -> StoredImage:
    return StoredImage(
        index,
        64,
        64,
        index,
        "image/png",
        size_bytes,
        bytes(32),
        first_sequence,
        chunk_bytes=chunk_bytes,
    )


def publish_image(feed: JobFeed, index: int, size_bytes: int, chunk_bytes: int = 1000) -> StoredImage:
    """Have a feed tell an image more, as the row of its job does."""
    told = image(index, size_bytes, chunk_bytes, feed.reserve_sequence())
    feed.sync(replace(JOB, state=JobState.RUNNING, images=(told,)))
    return told


def progress(step: int) -> Progressed:
    return Progressed(Progress(step, 50, 0.1, None))


def rest(feed: JobFeed, sequence: int = 0) -> list[JobEvent]:
    """All that a reader gets now who has read up to a sequence."""
    events = []
    while event := feed.next_after(sequence):
        events.append(event)
        sequence = event.sequence
    return events


def bodies(events: list[JobEvent]) -> list[Body]:
    return [event.body for event in events]


published = st.lists(
    st.one_of(
        st.integers(1, 9).map(Queued),
        st.integers(1, 50).map(progress),
        st.integers(1, 50).map(lambda step: Previewed(step, b"x")),
        st.integers(2, 3).map(lambda attempt: Restarted(attempt, "rank 1: killed", 0)),
        st.integers(0, 5000).map(lambda size: image(0, size)),
    ),
    max_size=30,
)


def publish(feed: JobFeed, item: Body | StoredImage) -> None:
    if isinstance(item, StoredImage):
        publish_image(feed, item.index, item.size_bytes)
    else:
        feed.publish(item)


@given(published, st.lists(st.integers(0, 3), max_size=30))
def test_sequences_only_grow_for_a_reader_at_any_pace(
    items: list[Body | StoredImage], reads_after_each: list[int]
) -> None:
    feed = JobFeed()
    seen = [0]
    for number, item in enumerate(items):
        publish(feed, item)
        for _ in range(reads_after_each[number] if number < len(reads_after_each) else 0):
            if event := feed.next_after(seen[-1]):
                seen.append(event.sequence)
    seen.extend(event.sequence for event in rest(feed, seen[-1]))
    assert seen == sorted(set(seen))


@given(st.integers(0, 10_000), st.integers(1, 3000))
def test_the_parts_of_an_image_cover_every_byte_exactly_once(size_bytes: int, chunk_bytes: int) -> None:
    feed = JobFeed()
    publish_image(feed, 0, size_bytes, chunk_bytes)
    position = 0
    for event in rest(feed):
        assert isinstance(event.body, ImagePart)
        assert event.body.offset == position
        assert event.body.length <= chunk_bytes
        position += event.body.length
    assert position == size_bytes


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=4), st.integers(1, 700), st.data())
def test_a_reader_who_comes_back_gets_exactly_the_parts_that_it_has_not_seen(
    sizes: list[int], chunk_bytes: int, data: st.DataObject
) -> None:
    feed = JobFeed()
    for index, size_bytes in enumerate(sizes):
        publish_image(feed, index, size_bytes, chunk_bytes)
    feed.publish(END)
    everything = rest(feed)
    seen = data.draw(st.integers(0, len(everything)))
    after_sequence = everything[seen - 1].sequence if seen else 0
    assert rest(feed, after_sequence) == everything[seen:]


def test_a_slow_reader_gets_the_newest_progress_and_misses_the_older() -> None:
    feed = JobFeed()
    for step in range(1, 51):
        feed.publish(progress(step))
    assert bodies(rest(feed)) == [progress(50)]


async def test_a_reader_that_keeps_up_misses_nothing() -> None:
    feed = JobFeed()
    events = feed.follow()
    seen = []
    for step in range(1, 51):
        feed.publish(progress(step))
        seen.append((await anext(events)).body)
    assert seen == [progress(step) for step in range(1, 51)]


async def test_a_late_reader_gets_the_newest_state_and_everything_that_follows() -> None:
    feed = JobFeed()
    feed.publish(Queued(2))
    feed.publish(Queued(1))
    feed.publish(progress(1))
    feed.publish(progress(2))
    seen = []

    async def read() -> None:
        seen.extend([event.body async for event in feed.follow()])

    reader = asyncio.create_task(read())
    await asyncio.sleep(0)
    feed.publish(progress(3))
    await asyncio.sleep(0)
    told = publish_image(feed, 0, 1500)
    feed.publish(END)
    await asyncio.wait_for(reader, 5)
    assert seen == [
        Queued(1),
        progress(2),
        progress(3),
        ImagePart(told, 0, 1000),
        ImagePart(told, 1000, 500),
        END,
    ]


async def test_following_ends_with_the_last_event_even_for_one_who_has_read_it() -> None:
    feed = JobFeed()
    feed.publish(END)
    first = [event async for event in feed.follow()]
    assert [event.is_last for event in first] == [True]
    assert [event async for event in feed.follow(first[-1].sequence)] == []


def test_a_restart_takes_back_the_progress_of_the_attempt_that_was_lost() -> None:
    feed = JobFeed()
    feed.publish(progress(7))
    feed.publish(Previewed(7, b"x"))
    restarted = Restarted(2, "rank 1: killed by SIGKILL", 0)
    feed.publish(restarted)
    assert bodies(rest(feed)) == [restarted]
    feed.publish(progress(1))
    assert bodies(rest(feed)) == [restarted, progress(1)]


def test_a_job_that_is_taken_has_been_first_and_is_told_so_once() -> None:
    feed = JobFeed()
    feed.publish_position(Queued(2, 5.0))
    feed.publish_first_position()
    feed.publish_first_position()
    assert bodies(rest(feed)) == [Queued(1)]
    assert rest(feed)[0].sequence == 2


def test_no_position_is_told_once_a_job_is_to_start_and_again_when_it_is_given_back() -> None:
    feed = JobFeed()
    feed.publish_position(Queued(1))
    sequence = feed.reserve_sequence()
    feed.publish_position(Queued(2))
    execution = Execution("demo", "FlowMatchLCMScheduler", 3.0, "tp=1")
    running = replace(JOB.started(execution, 1.0), started_sequence=sequence, last_sequence=sequence)
    feed.sync(running)
    feed.publish_position(Queued(2))
    assert [type(body) for body in bodies(rest(feed))] == [Queued, Started]
    feed.sync(running.requeued())
    feed.publish_position(Queued(1))
    assert bodies(rest(feed))[-1] == Queued(1)


def test_a_row_that_is_older_than_what_is_known_changes_nothing() -> None:
    feed = JobFeed()
    feed.sync(replace(JOB, claim_number=2))
    feed.sync(replace(JOB, claim_number=1, state=JobState.CANCELLED, last_sequence=5))
    assert rest(feed) == []
    assert feed.publish(progress(1)).sequence > 2 << 32


def test_what_was_said_already_is_not_said_again() -> None:
    feed = JobFeed()
    for position in (3, 3, 2, 2):
        feed.publish_position(Queued(position))
    (event,) = rest(feed)
    assert (event.body, event.sequence) == (Queued(2), 2)


@pytest.mark.parametrize(
    ("told", "now", "is_news"),
    [
        (Queued(3, 60.0), Queued(3, 50.0), False),
        (Queued(3, 60.0), Queued(3, 60.0), False),
        (Queued(3, 60.0), Queued(3, 30.0), True),
        (Queued(3, 60.0), Queued(3, 90.0), True),
        (Queued(3, 60.0), Queued(2, 50.0), True),
        (Queued(3, None), Queued(3, 50.0), True),
        (Queued(3, None), Queued(3, None), False),
        # What took longer than it was foreseen to.
        (Queued(1, 5.0), Queued(1, 0.5), False),
        (Queued(1, 5.0), Queued(1, 2.0), True),
    ],
)
def test_a_wait_is_told_again_only_when_it_is_not_what_was_to_be_expected(
    told: Queued, now: Queued, is_news: bool
) -> None:
    assert now.is_news(told, elapsed_seconds=10.0) == is_news


class WatchedPreview(Previewed):
    """A preview that knows whether somebody holds it: without slots it takes weak references."""


async def test_a_reader_that_stops_reading_holds_what_it_was_given_and_nothing_newer() -> None:
    feed = JobFeed()
    alive: weakref.WeakSet[WatchedPreview] = weakref.WeakSet()

    def publish_preview(step: int) -> None:
        preview = WatchedPreview(step, b"jpeg")
        alive.add(preview)
        feed.publish(preview)

    readers = []
    for step in range(1, 101):
        publish_preview(step)
        readers.append(feed.follow())
        await anext(readers[-1])
    for step in range(101, 2001):
        publish_preview(step)
    gc.collect()
    # One of each reader, and the newest.
    assert len(alive) <= len(readers) + 1
    for reader in readers:
        await reader.aclose()
    gc.collect()
    assert len(alive) <= 1


@pytest.mark.parametrize("was_followed_before", [False, True])
def test_who_comes_between_the_claim_and_the_start_of_a_job_is_told_that_it_started(
    was_followed_before: bool,
) -> None:
    claimed = replace(JOB, claim_number=1)
    drawing, elsewhere = JobFeed(), JobFeed()
    if was_followed_before:
        drawing.sync(JOB)
        drawing.publish_first_position()
    drawing.sync(claimed)
    drawing.publish_first_position()
    started_sequence = drawing.reserve_sequence()
    started = replace(
        claimed.started(Execution("demo", "FlowMatchLCMScheduler", 3.0, "tp=1"), JOB.create_time + 1),
        started_sequence=started_sequence,
        last_sequence=started_sequence,
    )
    elsewhere.sync(claimed)
    elsewhere.publish_first_position()
    (first,) = rest(elsewhere)
    elsewhere.sync(started)
    assert [type(body) for body in bodies(rest(elsewhere, first.sequence))] == [Started]
