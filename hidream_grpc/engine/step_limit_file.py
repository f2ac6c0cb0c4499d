"""Keeps what was learnt of steps over a restart: one small file, for the devices and layouts used last."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from hidream_grpc.engine.step_limit import MAX_SIZES, StepLimit
from hidream_grpc.model.checkpoint.prompt_lengths import TRAINED_PROMPT_TOKENS
from hidream_grpc.model.parameters import SampleSize

logger = logging.getLogger(__name__)

MAX_KEYS = 16
"""Sets of devices and layouts that are kept; those that were written longest ago make room."""


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


class _LearntOnDevices(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    key: StepLimitKey
    budgets: list[_LearntBudget]

    @property
    def by_size(self) -> dict[SampleSize, int]:
        return {SampleSize(b.width, b.height, b.prompt_tokens): b.step_pixels for b in self.budgets}


class _Document(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the file holds; the entry that was written last is the last."""

    version: Literal[2]
    learnt: list[_LearntOnDevices]


class StepLimitFile:
    """The file of a server's learnt budgets; None for a server that keeps none.

    A file that cannot be read or written costs nothing but what was learnt: one line in the log says so.
    Servers may share it: each writes a whole file under a name of its own, with what the others have learnt.
    Of two that write at the same moment, the entry of one is missing until its next write.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._key: StepLimitKey | None = None
        # One access at a time, in the order of the calls: the newest write is the last.
        self._access = asyncio.Lock()

    async def recall(self, key: StepLimitKey, limit: StepLimit) -> None:
        """Have a limit begin with what is known of these devices; nothing happens while they are the same."""
        if key == self._key:
            return
        learnt: Mapping[SampleSize, int] = {}
        if self._path is not None:
            async with self._access:
                learnt = await asyncio.to_thread(_read, self._path, key)
        # Together, so that a write never takes the budgets of one key for those of another.
        self._key = key
        limit.begin(learnt)

    async def keep(self, limit: StepLimit) -> None:
        """Write what a limit has learnt on the devices that were recalled last."""
        key, learnt = self._key, limit.learnt
        if self._path is None or key is None:
            return
        async with self._access:
            await asyncio.to_thread(_write, self._path, key, learnt)


def _read(path: Path, key: StepLimitKey) -> Mapping[SampleSize, int]:
    try:
        kept = _kept(path)
    except (OSError, msgspec.DecodeError) as error:
        logger.warning("what was learnt of steps is lost, since %s cannot be read: %s", path, error)
        return {}
    if kept and key not in kept:
        logger.info("%s is of other devices, another model, layout or weight format", path)
    return kept.get(key, {})


def _write(path: Path, key: StepLimitKey, learnt: Mapping[SampleSize, int]) -> None:
    unfinished = path.with_name(f"{path.name}.{secrets.token_hex(8)}.unfinished")
    try:
        kept = _kept_or_nothing(path)
        others = {size: pixels for size, pixels in kept.pop(key, {}).items() if size not in learnt}
        kept[key] = {**others, **learnt}
        entries = [_entry(key, by_size) for key, by_size in kept.items()]
        try:
            unfinished.write_bytes(msgspec.json.encode(_Document(2, entries[-MAX_KEYS:])))
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("what was learnt of steps cannot be kept in %s: %s", path, error)


def _kept(path: Path) -> dict[StepLimitKey, dict[SampleSize, int]]:
    """What the file holds, the entry that was written longest ago first; nothing where there is no file."""
    try:
        document = msgspec.json.decode(path.read_bytes(), type=_Document)
    except FileNotFoundError:
        return {}
    return {entry.key: entry.by_size for entry in document.learnt}


def _kept_or_nothing(path: Path) -> dict[StepLimitKey, dict[SampleSize, int]]:
    # The log has said that it cannot be read: at the start.
    try:
        return _kept(path)
    except (OSError, msgspec.DecodeError):
        return {}


def _entry(key: StepLimitKey, by_size: Mapping[SampleSize, int]) -> _LearntOnDevices:
    budgets = [
        _LearntBudget(size.width, size.height, pixels, size.prompt_tokens) for size, pixels in by_size.items()
    ]
    return _LearntOnDevices(key, budgets[-MAX_SIZES:])
