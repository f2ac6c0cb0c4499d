"""SIGHUP undoes what a lack of memory took away, whatever the layout."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import cast

import pytest

from hidream_grpc.engine.group.rank_group import RankGroup
from hidream_grpc.engine.step_limit import StepLimit
from hidream_grpc.model.parallel.layout import Layout
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
    step_limit = StepLimit(MAX_STEP_PIXELS)
    step_limit.run_out(64 * 64)
    assert step_limit.pixels < MAX_STEP_PIXELS
    for _ in range(2):
        take_all_devices(cast(RankGroup, Group(is_full)), step_limit)
        assert step_limit.pixels == MAX_STEP_PIXELS
    assert caplog.messages.count("SIGHUP: a step may hold 1048576 pixels again") == 1
