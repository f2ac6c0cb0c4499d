"""Keeps what was learnt of steps over a restart: one small file, for one set of devices."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec

from hidream_grpc.engine.step_limit import StepLimit
from hidream_grpc.model.checkpoint.prompt_lengths import TRAINED_PROMPT_TOKENS
from hidream_grpc.model.parameters import SampleSize

logger = logging.getLogger(__name__)

VERSION = 1


@dataclass(frozen=True, slots=True)
class StepLimitKey:
    """What the time of a step depends on beside its shape: elsewhere another budget is the best.

    Attributes:
        devices: names of the ranks' devices, in rank order.
        checkpoint_fingerprint: fingerprint of the model.
        layout: how the ranks share the work.
        weights: format of the transformer's weights.
    """

    devices: tuple[str, ...]
    checkpoint_fingerprint: str
    layout: str
    weights: str


_Positive = Annotated[int, msgspec.Meta(ge=1)]


class _LearntBudget(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    width: _Positive
    height: _Positive
    step_pixels: _Positive
    prompt_tokens: _Positive = TRAINED_PROMPT_TOKENS


class _Document(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    version: int
    key: StepLimitKey
    budgets: list[_LearntBudget]


class StepLimitFile:
    """The file of a server's learnt budgets; None for a server that keeps none.

    A file that cannot be read or written costs nothing but what was learnt: one line in the log says so.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._key: StepLimitKey | None = None
        # One write at a time, so that the newest is the last.
        self._writing = asyncio.Lock()

    async def recall(self, key: StepLimitKey, limit: StepLimit) -> None:
        """Have a limit begin with what is known of these devices; nothing happens while they are the same."""
        if key == self._key:
            return
        self._key = key
        limit.begin({} if self._path is None else await asyncio.to_thread(_read, self._path, key))

    async def keep(self, limit: StepLimit) -> None:
        """Write what a limit has learnt on the devices that were recalled last."""
        async with self._writing:
            if self._path is not None and self._key is not None:
                await asyncio.to_thread(_write, self._path, self._key, limit.learnt)


def _read(path: Path, key: StepLimitKey) -> Mapping[SampleSize, int]:
    try:
        document = msgspec.json.decode(path.read_bytes(), type=_Document)
    except FileNotFoundError:
        return {}
    except (OSError, msgspec.DecodeError) as error:
        logger.warning("what was learnt of steps is lost, since %s cannot be read: %s", path, error)
        return {}
    if (document.version, document.key) != (VERSION, key):
        logger.info("%s is of other devices, another model, layout or weight format", path)
        return {}
    return {SampleSize(b.width, b.height, b.prompt_tokens): b.step_pixels for b in document.budgets}


def _write(path: Path, key: StepLimitKey, learnt: Mapping[SampleSize, int]) -> None:
    budgets = [
        _LearntBudget(size.width, size.height, pixels, size.prompt_tokens) for size, pixels in learnt.items()
    ]
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.unfinished")
    try:
        unfinished.write_bytes(msgspec.json.encode(_Document(VERSION, key, budgets)))
        unfinished.replace(path)
    except OSError as error:
        logger.warning("what was learnt of steps cannot be kept in %s: %s", path, error)
