"""SIGHUP undoes what a lack of memory took away, whatever the layout."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import cast

import pytest

from hidream_grpc.engine.group.rank_group import RankGroup
from hidream_grpc.engine.scheduler import BatchLimits, StepScheduler
from hidream_grpc.model.parallel.layout import Layout
from hidream_grpc.model.parameters import GenerationParameters
from hidream_grpc.server.lifecycle import take_all_devices

MAX_STEP_PIXELS = 1 << 20


@dataclass
class Group:
    """A rank group that is on all its devices, or not."""

    is_full: bool

    @property
    def full_layout(self) -> Layout:
        return Layout()

    def ask_for_full_layout(self) -> bool:
        return not self.is_full


@pytest.mark.parametrize("is_full", [True, False])
def test_a_step_may_hold_what_is_configured_again(is_full: bool, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    scheduler = StepScheduler(BatchLimits(max_running_requests=1, max_step_pixels=MAX_STEP_PIXELS))
    picture = GenerationParameters(
        prompt="", width=64, height=64, num_inference_steps=1, guidance_scale=1.0, seed=0
    )
    scheduler.admit("large", picture)
    scheduler.lower_limit(("large",))
    assert scheduler.max_step_pixels < MAX_STEP_PIXELS
    for _ in range(2):
        take_all_devices(cast(RankGroup, Group(is_full)), scheduler)
        assert scheduler.max_step_pixels == MAX_STEP_PIXELS
    assert caplog.messages.count("SIGHUP: a step may hold 1048576 pixels again") == 1
