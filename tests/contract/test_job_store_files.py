"""The file of a SQLite job store is the one that was named, whatever its name."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from hidream_grpc.errors import StoreInUseError, StoreUnusableError
from hidream_grpc.jobs.store.store import SqlJobStore
from tests.support.file_names import ODD_FILE_NAMES
from tests.support.job_stores import added, new_job


def files_in(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ODD_FILE_NAMES, ids=ascii)
@pytest.mark.parametrize("is_relative", [False, True], ids=["absolute", "relative"])
async def test_jobs_are_in_the_file_and_in_the_folder_that_were_named(
    name: str, is_relative: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = Path(name) / name if is_relative else tmp_path / name / name
    store = SqlJobStore(file)
    await store.open()
    (job,) = await added(store, new_job())
    await store.close()
    again = SqlJobStore(tmp_path / name / name)
    await again.open()
    assert await again.get(None, job.job_id) == job
    await again.close()
    assert files_in(tmp_path) == {f"{name}/{name}", f"{name}/{name}.lock"}


async def test_a_link_to_the_file_is_the_same_store(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    file, link = tmp_path / "disk" / "jobs.sqlite", tmp_path / "jobs.sqlite"
    file.touch()
    link.symlink_to(file)
    store = SqlJobStore(link)
    await store.open()
    (job,) = await added(store, new_job())
    again = SqlJobStore(file)
    with pytest.raises(StoreInUseError):
        await again.open()
    await store.close()
    await again.open()
    assert await again.get(None, job.job_id) == job
    await again.close()


async def test_a_file_that_is_refused_starts_no_thread_of_the_driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a thread may end after the event loop, with a traceback."""
    names: list[str] = []
    start = threading.Thread.start

    def note_start(thread: threading.Thread) -> None:
        names.append(thread.name)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", note_start)
    file = tmp_path / "jobs.sqlite"
    file.write_bytes(b"no database " * 1000)
    with pytest.raises(StoreUnusableError, match="file is not a database"):
        await SqlJobStore(file).open()
    assert not [name for name in names if "connection_worker" in name]
    file.unlink()
    store = SqlJobStore(file)
    await store.open()
    await store.close()
    assert [name for name in names if "connection_worker" in name]


async def test_a_name_of_the_longest_that_sqlite_opens_is_a_store(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 200)
    file = folder / ("y" * (504 - len(bytes(folder)) - 1))
    store = SqlJobStore(file)
    await store.open()
    await store.close()
