import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from hidream.writing import write_file

WRITE = "import sys, pathlib, hidream.writing as w; w.write_file(pathlib.Path(sys.argv[1]), b'image')"


def written_by_another_process(path: str, stdout: int) -> None:
    subprocess.run([sys.executable, "-c", WRITE, path], stdout=stdout, check=True)


def test_a_file_replaces_the_older_one_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(b"older")
    write_file(path, b"newer")
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"picture.png": b"newer"}


def test_a_write_that_fails_leaves_the_older_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    path.mkdir()
    with pytest.raises(OSError, match="picture"):
        write_file(path, b"newer")
    assert [file.name for file in tmp_path.iterdir()] == ["picture.png"]


def test_a_link_is_followed_and_stays_one(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "picture.png").write_bytes(b"older")
    (tmp_path / "link.png").symlink_to("folder/between.png")
    (tmp_path / "folder" / "between.png").symlink_to("picture.png")
    write_file(tmp_path / "link.png", b"newer")
    assert (tmp_path / "link.png").is_symlink()
    assert {file.name for file in (tmp_path / "folder").iterdir()} == {"picture.png", "between.png"}
    assert (tmp_path / "folder" / "picture.png").read_bytes() == b"newer"


def test_a_link_to_nothing_yet_gets_its_file(tmp_path: Path) -> None:
    (tmp_path / "link.png").symlink_to("picture.png")
    write_file(tmp_path / "link.png", b"newer")
    assert (tmp_path / "picture.png").read_bytes() == b"newer"
    assert (tmp_path / "link.png").is_symlink()


def test_links_in_a_circle_are_refused(tmp_path: Path) -> None:
    (tmp_path / "link.png").symlink_to("other.png")
    (tmp_path / "other.png").symlink_to("link.png")
    with pytest.raises(OSError, match="symbolic links"):
        write_file(tmp_path / "link.png", b"newer")


def test_a_pipe_is_written_to_and_stays_one(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_file(path, b"image")
        assert os.read(reader, 99) == b"image"
    finally:
        os.close(reader)
    assert path.is_fifo()
    assert list(tmp_path.iterdir()) == [path]


def test_a_device_is_written_to_and_stays_one() -> None:
    write_file(Path("/dev/null"), b"image")
    assert Path("/dev/null").is_char_device()


def test_a_file_that_is_open_as_stdout_is_written_to_behind_what_it_has(tmp_path: Path) -> None:
    path = tmp_path / "all.bin"
    path.write_bytes(b"older ")
    with path.open("ab") as stdout:
        number = path.stat().st_ino
        written_by_another_process("/dev/stdout", stdout.fileno())
    assert (path.read_bytes(), path.stat().st_ino) == (b"older image", number)


def test_a_socket_as_stdout_is_written_to() -> None:
    # What Node hands to its children.
    ours, theirs = socket.socketpair()
    with ours, theirs:
        written_by_another_process("/dev/stdout", theirs.fileno())
        assert ours.recv(99) == b"image"
