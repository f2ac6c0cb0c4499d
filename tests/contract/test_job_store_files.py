"""The file of a SQLite job store is the one that was named, whatever its name."""

from __future__ import annotations

from pathlib import Path

import pytest

from hidream_grpc.jobs.store.store import SqlJobStore
from tests.file_names import ODD_FILE_NAMES
from tests.job_stores import added, new_job


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
