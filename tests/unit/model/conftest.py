from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.support.checkpoints import write_tiny_checkpoint
from tests.support.torch_threads import one_thread

__all__ = ["one_thread"]


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny")


@pytest.fixture(scope="session")
def split_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint without Llama, and a Llama folder."""
    folder = tmp_path_factory.mktemp("checkpoints")
    return write_tiny_checkpoint(folder / "tiny", folder / "llama"), folder / "llama"


@pytest.fixture
def own_checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint to break."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "own"))


@pytest.fixture
def own_split_checkpoint(split_checkpoint: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    """A copy of the checkpoint without Llama, and of the Llama folder, to break."""
    checkpoint, llama = split_checkpoint
    return Path(shutil.copytree(checkpoint, tmp_path / "own")), Path(
        shutil.copytree(llama, tmp_path / "llama")
    )
