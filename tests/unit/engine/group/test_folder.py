from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from hidream_grpc.engine.group.folder import GroupFolder


@pytest.fixture(autouse=True)
def temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def folders(parent: Path) -> list[Path]:
    return list(parent.iterdir())


def folder_of_a_killed_server(parent: Path) -> Path:
    script = """
import os, signal
from hidream_grpc.engine.group.folder import GroupFolder
from hidream_grpc.engine.protocol.collective_counter import CollectiveCounterReader
folder = GroupFolder()
(folder.path / "ranks").touch()
CollectiveCounterReader(folder.path)
os.kill(os.getpid(), signal.SIGKILL)
"""
    environment = {**os.environ, "TMPDIR": str(parent)}
    killed = subprocess.run([sys.executable, "-c", script], env=environment, timeout=60)
    assert killed.returncode == -signal.SIGKILL
    (folder,) = (path for path in parent.iterdir() if list(path.glob("collectives-*")))
    return folder


def test_what_a_killed_server_left_goes_at_the_next_start_and_a_living_ones_stays(tmp_path: Path) -> None:
    living = GroupFolder()
    left = folder_of_a_killed_server(tmp_path)
    assert sorted(folders(tmp_path)) == sorted([living.path, left])
    third = GroupFolder()
    assert sorted(folders(tmp_path)) == sorted([living.path, third.path])
    living.remove()
    third.remove()
    assert folders(tmp_path) == []


def test_folders_of_other_users_of_other_programs_and_behind_links_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    kept = [tmp_path / name for name in ("hidream-test-1", "hidream-1", "hidream.link", "hidream.file")]
    kept[0].mkdir()
    kept[1].mkdir()
    kept[2].symlink_to(elsewhere)
    kept[3].touch()
    GroupFolder().remove()
    assert sorted(folders(tmp_path)) == sorted([elsewhere, *kept])
    left = folder_of_a_killed_server(tmp_path)
    stranger = os.geteuid() + 1
    with monkeypatch.context() as patched:
        # Another user owns nothing here.
        patched.setattr(os, "geteuid", lambda: stranger)
        with pytest.raises(PermissionError):
            GroupFolder()
    assert left in folders(tmp_path)


def test_a_folder_without_the_marker_of_a_server_stays_whatever_its_name(tmp_path: Path) -> None:
    kept = [
        *(tmp_path / "hidream.data" / name for name in ("jobs.sqlite", ".of-hidream-grpc")),
        tmp_path / "hidream.model" / "model_index.json",
        # The suffix is as long as that of a server's folder.
        tmp_path / "hidream.weights1" / "ranks",
    ]
    for path in kept:
        path.parent.mkdir(exist_ok=True)
        path.touch()
    (tmp_path / "hidream.in_a_dir" / ".of-hidream-grpc").mkdir(parents=True)
    (tmp_path / "hidream.emptynow").mkdir()
    before = sorted(tmp_path.rglob("*"))
    GroupFolder().remove()
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["notes", "ranks.old", "collectives-of-mine"])
@pytest.mark.parametrize("is_folder", [True, False], ids=["folder", "file"])
def test_what_no_server_makes_keeps_its_folder_with_all_in_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, is_folder: bool
) -> None:
    left = folder_of_a_killed_server(tmp_path)
    if is_folder:
        (left / name).mkdir()
    else:
        (left / name).touch()
    before = sorted(tmp_path.rglob("*"))
    GroupFolder().remove()
    assert sorted(tmp_path.rglob("*")) == before
    assert [record.getMessage() for record in caplog.records] == [
        f"cannot remove {left} of a server that was killed: it holds what no server has made"
    ]


def test_a_folder_that_a_cleaner_took_ends_in_order_and_leaks_no_descriptor(
    caplog: pytest.LogCaptureFixture,
) -> None:
    num_descriptors = len(folders(Path("/proc/self/fd")))
    folder = GroupFolder()
    shutil.rmtree(folder.path)
    folder.remove()
    assert len(folders(Path("/proc/self/fd"))) == num_descriptors
    assert caplog.records == []


def test_servers_that_start_at_the_same_time_take_no_folder_from_each_other(tmp_path: Path) -> None:
    made: list[GroupFolder] = []

    def make_some() -> None:
        made.extend(GroupFolder() for _ in range(25))

    threads = [threading.Thread(target=make_some) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(folder.path for folder in made) == sorted(folders(tmp_path))
    for folder in made:
        folder.remove()


def test_on_a_file_system_without_locks_nothing_is_swept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = folder_of_a_killed_server(tmp_path)

    def refuse(descriptor: int, operation: int) -> None:
        raise OSError("no locks here")

    monkeypatch.setattr(fcntl, "flock", refuse)
    folder = GroupFolder()
    assert sorted(folders(tmp_path)) == sorted([left, folder.path])
    folder.remove()
