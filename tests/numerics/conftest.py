from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from hidream_grpc.devices.device import open_device
from hidream_grpc.model.pipeline import HiDreamModel
from tests.support.checkpoints import write_tiny_checkpoint, write_variant
from tests.support.torch_threads import one_thread

__all__ = ["one_thread"]

LoadModel = Callable[[str], HiDreamModel]


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny")


@pytest.fixture(scope="session")
def checkpoint_of(tiny_checkpoint: Path) -> Callable[[str], Path]:
    """Folder of the tiny checkpoint with another scheduler, by its key in `SCHEDULERS`."""

    @cache
    def write(scheduler: str) -> Path:
        return write_variant(tiny_checkpoint, tiny_checkpoint.parent / scheduler, scheduler)

    return write


@pytest.fixture(scope="session")
def model_of(checkpoint_of: Callable[[str], Path]) -> LoadModel:
    """The tiny model with another scheduler, by its key in `SCHEDULERS`, on the CPU."""
    return cache(
        lambda scheduler: HiDreamModel.from_pretrained(checkpoint_of(scheduler), None, open_device("cpu", 0))
    )
