"""A folder of images that is not there for a while, as an unmounted network disk is not."""

from __future__ import annotations

from pathlib import Path


class ArtifactFolder:
    """The folder that all replicas keep images in.

    While it is away a file has its name: root, who may write everywhere, cannot make the folder anew.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._away = path.with_name(path.name + ".away")

    def fail(self) -> None:
        """Take it away, until `heal`."""
        if not self._away.exists():
            self.path.rename(self._away)
            self.path.touch()

    def heal(self) -> None:
        """Bring it back as it was."""
        if self._away.exists():
            self.path.unlink()
            self._away.rename(self.path)

    def files(self) -> list[str]:
        """Every file in it, relative to it."""
        return sorted(str(each.relative_to(self.path)) for each in self.path.rglob("*") if each.is_file())
