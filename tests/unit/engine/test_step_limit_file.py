"""What was learnt of steps is there after a restart, for the same devices; no file is ever needed."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from hidream_grpc.engine.step_limit import StepLimit
from hidream_grpc.engine.step_limit_file import MAX_KEYS, StepLimitFile, StepLimitKey
from hidream_grpc.model.parameters import SampleSize
from tests.support.counting_ranks import CountingRanks, Service
from tests.support.live_server import wait_until

MAX_PIXELS = 8 * 1024 * 1024
LEARNT = {
    SampleSize(512, 512): 4 * 1024 * 1024,
    SampleSize(1024, 768): 1024 * 1024,
    SampleSize(1024, 768, 256): 2 * 1024 * 1024,
}
KEY = StepLimitKey(("NVIDIA H200", "NVIDIA H200"), "86637e71f35d8ddd", "tp=2", "bfloat16")
DEGRADED = replace(KEY, devices=("NVIDIA H200",), layout="tp=1")
LEARNT_DEGRADED = {SampleSize(512, 512): 2 * 1024 * 1024}
TIMEOUT_SECONDS = 60


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "step_limit.json"


async def keep(path: Path, key: StepLimitKey = KEY, learnt: Mapping[SampleSize, int] = LEARNT) -> None:
    file, limit = StepLimitFile(path), StepLimit(MAX_PIXELS)
    await file.recall(key, limit)
    limit.begin(learnt)
    await file.keep(limit)


async def recalled(path: Path, key: StepLimitKey = KEY) -> object:
    limit = StepLimit(MAX_PIXELS)
    await StepLimitFile(path).recall(key, limit)
    return limit.learnt


async def test_what_was_learnt_is_there_after_a_restart(path: Path) -> None:
    assert await recalled(path) == {}
    await keep(path)
    assert await recalled(path) == LEARNT
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    "key",
    [
        replace(KEY, devices=("Ascend910B", "Ascend910B")),
        replace(KEY, checkpoint_fingerprint="0123456789abcdef"),
        replace(KEY, layout="cfg=2"),
        replace(KEY, weights="int8"),
    ],
    ids=["device", "model", "layout", "weights"],
)
async def test_another_device_model_layout_or_weight_format_starts_anew(
    path: Path, key: StepLimitKey
) -> None:
    await keep(path)
    assert await recalled(path, key) == {}


async def test_the_full_layout_is_known_again_after_a_degradation(path: Path) -> None:
    await keep(path)
    await keep(path, DEGRADED, LEARNT_DEGRADED)
    assert await recalled(path) == LEARNT
    assert await recalled(path, DEGRADED) == LEARNT_DEGRADED


async def test_what_was_kept_longest_ago_makes_room(path: Path) -> None:
    keys = [replace(KEY, checkpoint_fingerprint=f"{number:016x}") for number in range(MAX_KEYS)]
    for key in (*keys, keys[0], KEY):
        await keep(path, key)
    assert [await recalled(path, key) for key in (keys[0], keys[1], keys[2], KEY)] == [
        LEARNT,
        {},
        LEARNT,
        LEARNT,
    ]


async def test_a_write_that_meets_a_change_of_layout_stays_with_the_layout_it_learnt_on(path: Path) -> None:
    file, limit = StepLimitFile(path), StepLimit(MAX_PIXELS)
    await file.recall(KEY, limit)
    limit.begin(LEARNT)
    await asyncio.gather(file.recall(DEGRADED, limit), file.keep(limit))
    assert limit.learnt == {}
    assert await recalled(path, DEGRADED) == {}
    assert await recalled(path) == LEARNT


async def test_servers_on_one_folder_add_to_what_each_other_has_learnt(path: Path) -> None:
    await keep(path, learnt=LEARNT)
    known_to_both, new = SampleSize(512, 512), SampleSize(256, 256)
    await keep(path, learnt={known_to_both: 1024 * 1024, new: 1024 * 1024})
    assert await recalled(path) == LEARNT | {known_to_both: 1024 * 1024, new: 1024 * 1024}


async def test_two_servers_that_write_at_once_leave_a_whole_file(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    both_have_written = threading.Barrier(2, timeout=TIMEOUT_SECONDS)
    replace_file = Path.replace

    def replace_when_both_have_written(unfinished: Path, target: Path) -> Path:
        both_have_written.wait()
        return replace_file(unfinished, target)

    monkeypatch.setattr(Path, "replace", replace_when_both_have_written)
    # In containers, both are process 1: here, too, they have one process number.
    await asyncio.gather(keep(path), keep(path))
    assert not [message for message in caplog.messages if "cannot be kept" in message]
    assert await recalled(path) == LEARNT
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b'{"version": 1}', b"\xff\xfe"],
    ids=["empty", "cut off", "list", "no key", "no text"],
)
async def test_a_file_that_cannot_be_read_starts_anew_with_one_line(
    path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    await asyncio.to_thread(path.write_bytes, content)
    assert await recalled(path) == {}
    assert [r.levelno for r in caplog.records if "what was learnt of steps is lost" in r.message] == [
        logging.WARNING
    ]
    await keep(path)
    assert await recalled(path) == LEARNT


async def test_a_folder_that_cannot_be_written_costs_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await keep(tmp_path / "gone" / "step_limit.json")
    assert sum("cannot be kept" in message for message in caplog.messages) == 1


async def test_the_engine_begins_with_what_the_one_before_it_has_learnt(path: Path) -> None:
    service = Service(CountingRanks(), learnt_path=path, max_step_pixels=MAX_PIXELS)
    # More than fit the least budget, on ranks that take equally long for any number of them.
    for number in range(6):
        service.submit(str(number), num_inference_steps=60, num_images=128)
    await service.run_until_ended("0", "1", "2", "3", "4", "5")
    learnt = service.step_limit.learnt
    assert learnt[SampleSize(64, 64)] > 1024 * 1024
    # It is written beside the rounds of the engine.
    pixels = str(learnt[SampleSize(64, 64)])
    await asyncio.to_thread(
        wait_until, lambda: path.exists() and pixels in path.read_text(), TIMEOUT_SECONDS, "it is kept"
    )
    next_service = Service(CountingRanks(), learnt_path=path, max_step_pixels=MAX_PIXELS)
    next_service.submit("next", num_inference_steps=1)
    await next_service.run_until_ended("next")
    assert next_service.step_limit.learnt == learnt
