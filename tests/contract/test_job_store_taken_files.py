"""What a job store accepts while its files are taken away or replaced."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import NoReturn

import pytest
import sqlalchemy as sa

from hidream_grpc.background import reason_of
from hidream_grpc.errors import (
    StoreUnavailableError,
)
from hidream_grpc.jobs.store import sqlite
from tests.support.job_stores import (
    StoreDatabase,
    added,
    ids,
    new_job,
    told,
)


async def test_after_the_log_was_deleted_nothing_is_accepted_and_closing_keeps_what_was(
    sqlite_database: StoreDatabase, tmp_path: Path
) -> None:
    async with sqlite_database.opened() as store:
        kept = await added(store, *(new_job() for _ in range(3)))
        (tmp_path / "jobs.sqlite-wal").unlink()
        assert isinstance(await told(store), StoreUnavailableError)
        with pytest.raises(StoreUnavailableError):
            await store.get(None, kept[0].job_id)
    async with sqlite_database.opened() as store:
        assert {*ids(await store.get_all(ids(kept)))} == {*ids(kept)}
        assert (await store.counts()).total() == len(kept)


@pytest.mark.parametrize("end", ["", "-wal", "-shm", ".lock"])
async def test_nothing_is_written_beside_a_file_that_is_not_the_one_that_was_opened(
    end: str, sqlite_database: StoreDatabase, tmp_path: Path
) -> None:
    path = tmp_path / f"jobs.sqlite{end}"
    async with sqlite_database.opened() as store:
        away = path.rename(tmp_path / "away")
        assert isinstance(await told(store), StoreUnavailableError)
        away.rename(path)
        assert await told(store) is None


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO])
async def test_why_a_file_cannot_be_looked_at_is_told(
    code: int, sqlite_database: StoreDatabase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path) -> NoReturn:
        raise OSError(code, os.strerror(code), str(path))

    async with sqlite_database.opened() as store:
        monkeypatch.setattr(sqlite, "_identity", fail)
        error = await told(store)
        assert error is not None
        path = tmp_path / "jobs.sqlite"
        assert reason_of(error) == f"the job store does not answer ({path}: {os.strerror(code)})"


async def test_a_job_that_was_committed_into_a_file_that_just_went_is_not_acknowledged(
    sqlite_database: StoreDatabase, tmp_path: Path
) -> None:
    path, away = tmp_path / "jobs.sqlite", tmp_path / "away.sqlite"
    async with sqlite_database.opened() as store:
        engine = store._database._engine.sync_engine
        sa.event.listen(engine, "commit", lambda _: path.rename(away), once=True)
        error = await told(store)
        assert isinstance(error, StoreUnavailableError)
        assert reason_of(error) == (
            f"the job store does not answer ({path} was removed or replaced while it is in use: "
            "put it back, or restart the server)"
        )
        away.rename(path)
        assert await told(store) is None
