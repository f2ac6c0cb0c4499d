"""What every call of the job store has in common: it goes on to its end, and publishes what it changed."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar

from sqlalchemy.ext.asyncio import AsyncConnection

from hidream_grpc.errors import StoreFullError, StoreUnavailableError
from hidream_grpc.jobs.job import Job, JobState
from hidream_grpc.jobs.store import queries
from hidream_grpc.jobs.store.changes import CHANNEL, Change, ChangeHub, to_text
from hidream_grpc.jobs.store.clock import StoreClock
from hidream_grpc.jobs.store.database import Database
from hidream_grpc.jobs.store.failures import begun_anew
from hidream_grpc.jobs.uninterrupted import RunningCalls

P = ParamSpec("P")
Result = TypeVar("Result")
Store = TypeVar("Store", bound="StoreBase")


def uninterrupted(
    method: Callable[Concatenate[Store, P], Coroutine[Any, Any, Result]], /
) -> Callable[Concatenate[Store, P], Coroutine[Any, Any, Result]]:
    """Have a method go on to its end when its caller is cancelled, and begin anew after a conflict.

    SQLite's driver works in a thread, which a cancellation does not reach: a transaction that is left in
    the middle keeps the database locked for all others.
    """

    async def run(self: Store, /, *args: P.args, **kwargs: P.kwargs) -> Result:
        try:
            result = await begun_anew(lambda: method(self, *args, **kwargs))
        except (StoreUnavailableError, StoreFullError) as error:
            self.observe_call(method.__name__, error)
            raise
        # A claim of nothing has written nothing.
        if result != ():
            self.observe_call(method.__name__, None)
        return result

    @functools.wraps(method)
    async def call(self: Store, /, *args: P.args, **kwargs: P.kwargs) -> Result:
        return await self._calls.finish(run(self, *args, **kwargs))

    return call


class StoreBase:
    """The database, and the hub that publishes its changes.

    Attributes:
        clock: gives the time of all that is kept.
        observe_call: called with the name of each method that was called, and what the database refused it
            with.
    """

    def __init__(self, database: Database, end_observers: Sequence[Callable[[Job], None]]) -> None:
        self._database = database
        self._hub = ChangeHub()
        self._calls = RunningCalls()
        self._end_observers = end_observers
        self._num_ended: Counter[JobState] = Counter()
        self.clock = StoreClock()
        self.observe_call: Callable[[str, StoreUnavailableError | StoreFullError | None], None] = (
            lambda name, error: None
        )

    @property
    def is_shared(self) -> bool:
        """Whether other replicas may work on the same jobs."""
        return not self._database.is_sqlite

    def num_ended(self, state: JobState) -> int:
        """Number of jobs that this process ended in a state."""
        return self._num_ended[state]

    async def _notify(self, connection: AsyncConnection, changes: Sequence[Change]) -> None:
        """Have PostgreSQL notify all servers, this one included, when the transaction commits."""
        if changes and not self._database.is_sqlite:
            await connection.execute(queries.notify(CHANNEL, [to_text(change) for change in changes]))

    def _committed(self, changes: Sequence[Change], job: Job | None = None) -> None:
        """Note that a transaction has committed; the changes of a SQLite file are published from here."""
        if changes and job is not None:
            self._note_end(job)
        if self._database.is_sqlite:
            self._hub.publish(changes)

    def _note_end(self, job: Job) -> None:
        """Count a job that this process has ended; nothing happens when it has not ended."""
        if job.state.has_ended:
            self._num_ended[job.state] += 1
            for observe in self._end_observers:
                observe(job)
