"""Which caller sees which jobs, and in which order, on SQLite and on PostgreSQL alike."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hidream_grpc.errors import (
    InvalidRequestError,
    JobNotFoundError,
)
from hidream_grpc.jobs.job import CancelReason, JobState
from hidream_grpc.jobs.store.page_token import decode_page_token, filter_digest_of
from hidream_grpc.jobs.store.store import SqlJobStore
from tests.support.job_stores import (
    OWNER,
    added,
    claimed,
    finished,
    ids,
    new_job,
    started,
)


async def test_nobody_sees_the_job_of_another(store: SqlJobStore) -> None:
    (job,) = await added(store, new_job())
    for attempt in (
        store.get("bert", job.job_id),
        store.request_cancel("bert", job.job_id, CancelReason.REQUESTED),
        store.delete("bert", job.job_id),
        store.get(OWNER, "no such job"),
    ):
        with pytest.raises(JobNotFoundError):
            await attempt
    assert (await store.list("bert")).jobs == ()
    assert await store.get(None, job.job_id) == job


async def test_pages_show_every_job_once_newest_first_while_jobs_come_and_go(store: SqlJobStore) -> None:
    jobs = await added(store, *(new_job() for _ in range(10)))
    seen: list[str] = []
    page = await store.list(OWNER, page_size=3)
    seen += ids(page.jobs)
    await added(store, new_job())
    for index in (7, 5):  # the last one that was shown, and one that was not yet
        await store.request_cancel(OWNER, jobs[index].job_id, CancelReason.REQUESTED)
        await store.delete(OWNER, jobs[index].job_id)
    while page.next_page_token:
        page = await store.list(OWNER, page_size=3, page_token=page.next_page_token)
        seen += ids(page.jobs)
    assert seen == [jobs[index].job_id for index in (9, 8, 7, 6, 4, 3, 2, 1, 0)]


async def test_the_last_page_has_no_token_even_when_it_is_full(store: SqlJobStore) -> None:
    await added(store, *(new_job() for _ in range(4)))
    first = await store.list(OWNER, page_size=2)
    last = await store.list(OWNER, page_size=2, page_token=first.next_page_token)
    assert (len(last.jobs), last.next_page_token) == (2, "")


async def test_a_page_token_of_another_filter_is_refused(store: SqlJobStore) -> None:
    await added(store, *(new_job() for _ in range(3)))
    token = (await store.list(OWNER, page_size=1)).next_page_token
    with pytest.raises(InvalidRequestError) as caught:
        await store.list(OWNER, states=[JobState.QUEUED], page_size=1, page_token=token)
    assert [violation.field for violation in caught.value.violations] == ["page_token"]


@given(token=st.text(min_size=1) | st.binary(min_size=1).map(lambda data: data.hex()))
def test_whatever_is_sent_as_a_page_token_is_refused(token: str) -> None:
    with pytest.raises(InvalidRequestError):
        decode_page_token(token, filter_digest_of(OWNER, frozenset(), {}))


async def test_jobs_are_found_by_state_and_by_all_of_their_labels(store: SqlJobStore) -> None:
    a, b, c = await added(
        store,
        new_job(labels={"team": "x", "run": "1"}),
        new_job(labels={"team": "x", "run": "2"}),
        new_job(labels={"team": "y", "run": "1"}),
    )
    (running,) = await claimed(store)
    await store.save(started(running))

    async def found(states: tuple[JobState, ...] = (), **labels: str) -> list[str]:
        return ids((await store.list(OWNER, states, labels)).jobs)

    assert await found(team="x") == [b.job_id, a.job_id]
    assert await found(team="x", run="1") == [a.job_id]
    assert await found(team="1") == []
    assert await found((JobState.QUEUED,)) == [c.job_id, b.job_id]
    assert await found((JobState.QUEUED,), team="x") == [b.job_id]
    assert await found((JobState.RUNNING, JobState.FAILED)) == [a.job_id]


async def test_jobs_that_have_not_ended_are_counted_by_state(store: SqlJobStore) -> None:
    await added(store, new_job(), new_job())
    await added(store, new_job(owner="bert"))
    done, begun = await claimed(store, limit=2)
    await finished(store, done)
    await store.save(started(begun))
    assert await store.counts() == {JobState.QUEUED: 1, JobState.RUNNING: 1}
