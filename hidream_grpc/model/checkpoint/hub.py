"""How the hub's client stores downloads, in its cache and in other folders.

The cache is `models--OWNER--NAME/{blobs,snapshots}`: the name of a snapshot is the 40 digits of its revision,
and its files are links to blobs.
"""

from __future__ import annotations

from pathlib import Path

_DOWNLOADS = Path(".cache", "huggingface", "download")


def repository_name(path: Path) -> str | None:
    """Name of the repository to whose part of the cache a file or folder belongs; None for any other."""
    repository = _repository(path.resolve())
    return None if repository is None else repository.name.rsplit("--", 1)[1]


def is_snapshot(folder: Path) -> bool:
    """Whether a folder is a snapshot in the cache."""
    snapshots = folder.resolve().parent
    return snapshots.name == "snapshots" and snapshots.parent == _repository(snapshots)


def snapshots_hint(folder: Path) -> str:
    """Hint for a folder that lacks a file: where its snapshots are, if it is a repository in the cache."""
    if not folder.resolve().name.startswith("models--"):
        return ""
    names = [path.name for path in folder.glob("snapshots/*")]
    return f"; name the folder of a revision: snapshots/{names[0] if len(names) == 1 else '<revision>'}"


def has_unfinished_download(folder: Path) -> bool:
    """Whether the client has started, but not finished, a download into this folder of a checkpoint."""
    places = [folder, folder / _DOWNLOADS, folder.parent / _DOWNLOADS / folder.name]
    if repository := _repository(folder.resolve()):
        places.append(repository / "blobs")
    return any(any(place.glob("*.incomplete")) for place in places)


def _repository(path: Path) -> Path | None:
    return next((parent for parent in (path, *path.parents) if parent.name.startswith("models--")), None)
