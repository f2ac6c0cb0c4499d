"""Rank groups with the demo model for tests: what they are made of, and how to draw with one."""

from __future__ import annotations

import asyncio
import itertools
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import psutil
import pytest

from hidream_grpc.devices.detect import select_devices
from hidream_grpc.devices.device_types import CPU
from hidream_grpc.engine.group.config import GroupConfig, GroupTimeouts
from hidream_grpc.engine.group.rank_group import RankGroup
from hidream_grpc.engine.protocol.messages import Admission, Decode, DecodedImage, StepPlan
from hidream_grpc.model.checkpoint.demo import demo_checkpoint_path
from hidream_grpc.model.checkpoint.fingerprint import fingerprint_of
from hidream_grpc.model.parallel.layout import Layout
from hidream_grpc.model.parameters import GenerationParameters

_plan_ids = itertools.count(1)


def group_config(num_ranks: int, **changes: object) -> GroupConfig:
    """Ranks on the CPU with the demo model, one thread each.

    Another `model_path` comes with its `checkpoint_fingerprint`.
    """
    config = GroupConfig(
        model_path=demo_checkpoint_path(),
        checkpoint_fingerprint=fingerprint_of(demo_checkpoint_path(), None),
        devices=select_devices(CPU, tuple(range(num_ranks))),
        layout=Layout(data_parallel=num_ranks),
        timeouts=GroupTimeouts(load_seconds=120.0),
    )
    return replace(config, **changes)  # type: ignore[arg-type]


def picture(**changes: object) -> GenerationParameters:
    """A request of three steps and a small square, with guidance, unless told otherwise."""
    values: dict[str, object] = {
        "prompt": "a red circle on a blue background",
        "width": 64,
        "height": 64,
        "num_inference_steps": 3,
        "guidance_scale": 3.0,
        "seed": 7,
    }
    return GenerationParameters(**(values | changes))  # type: ignore[arg-type]


def admission(claim_id: str, parameters: GenerationParameters) -> Admission:
    log_fields = {"job_id": f"job of {claim_id}", "request_id": f"request of {claim_id}"}
    return Admission(claim_id=claim_id, log_fields=log_fields, parameters=parameters)


def plan(**content: object) -> StepPlan:
    """A plan with an id of its own."""
    return StepPlan(plan_id=next(_plan_ids), **content)  # type: ignore[arg-type]


async def draw(group: RankGroup, parameters: GenerationParameters) -> bytes:
    """Draw image 0 of a request, step by step; its bytes."""
    claim_id = f"job {next(_plan_ids)}"
    await group.execute(plan(admissions=(admission(claim_id, parameters),)))
    for _ in range(parameters.num_inference_steps):
        await group.execute(plan(step_claims=(claim_id,)))
    image = await decode(group, claim_id)
    await group.execute(plan(releases=(claim_id,)))
    return image.data


async def decode(group: RankGroup, claim_id: str, rank: int = 0) -> DecodedImage:
    """Have one rank decode image 0."""
    answers = await group.execute(plan(decodes=(Decode(claim_id=claim_id, image_index=0, rank=rank),)))
    (image,) = answers[rank].images
    return image


async def until(condition: Callable[[], bool], what: str, timeout_seconds: float = 60.0) -> None:
    """Return once the condition holds; fail when it does not in time."""
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_seconds:g} s: {what}"
        await asyncio.sleep(0.002)


def zygote_pid_of(group: RankGroup) -> int:
    """Process id of the parent of a started group's ranks."""
    zygote = group._processes.zygote
    assert zygote is not None
    return zygote.pid


def store_pid_of(group: RankGroup) -> int:
    """Process id of the host of a started group's TCPStore."""
    store = group._processes.store
    assert store is not None
    return store.pid


def is_alive(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@contextmanager
def no_memory_kept() -> Iterator[None]:
    """Ranks that are started inside give freed memory back at once, so that little memory is little.

    Else glibc raises its threshold with every large block that is freed, and serves the next from its heap.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MALLOC_MMAP_THRESHOLD_", str(128 * 1024))
        yield


@contextmanager
def little_memory(pid: int, spare_bytes: int = 32 * 1024 * 1024) -> Iterator[None]:
    """Let a process allocate next to nothing more; see `no_memory_kept`."""
    process = psutil.Process(pid)
    limits = process.rlimit(resource.RLIMIT_AS)
    process.rlimit(resource.RLIMIT_AS, (process.memory_info().vms + spare_bytes, limits[1]))
    try:
        yield
    finally:
        process.rlimit(resource.RLIMIT_AS, limits)
