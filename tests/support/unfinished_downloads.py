"""Files of a checkpoint as downloads leave them that were not finished."""

from __future__ import annotations

from pathlib import Path


def halve(path: Path) -> None:
    """Cut a file off, as a download that was stopped may."""
    path.write_bytes(path.read_bytes()[:-1])


def unlink_target(path: Path) -> None:
    """Leave a link of the hub's cache to a blob that is not there."""
    path.unlink()
    path.symlink_to("../../blobs/0123abcd")


def leave_pointer(path: Path) -> None:
    """Leave what git clones without git-lfs."""
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 123\n")


def leave_part(path: Path) -> None:
    """Leave what the hub's client has of a file in its own folder."""
    path.unlink()
    downloads = path.parent / ".cache" / "huggingface" / "download"
    downloads.mkdir(parents=True)
    (downloads / "x1.0123abcd.incomplete").write_bytes(b"half")
