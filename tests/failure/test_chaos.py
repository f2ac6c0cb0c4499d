"""Ranks, their zygote and their store die at random for a while, and no request is lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.chaos.run import LAYOUT, run_chaos
from scripts.chaos.saboteur import Card

SPARE_MEMORY_BYTES = 16 * 1024 * 1024
POOLED_DESCRIPTORS = 15
"""Files of up to five connections to SQLite that are kept open, three each; a leak has one for each death."""


# The first seed kills and stops ranks within its first seconds.
@pytest.mark.long
@pytest.mark.parametrize(("seed", "seconds"), [(155, 6.0), (5, 25.0)])
def test_every_request_succeeds_as_if_nothing_had_happened_and_nothing_is_left(
    seed: int, seconds: float, tmp_path: Path
) -> None:
    log_path = tmp_path / "service.log"
    chaos = run_chaos(seed, seconds, log_path, say=print)
    assert chaos.faults == [], log_path.read_text(encoding="utf-8")
    # It was chaos: ranks died and hung under requests.
    assert chaos.strikes[Card.KILL_RANK] > 0
    assert chaos.strikes[Card.STOP_RANK] > 0
    assert chaos.num_restarted > 0
    assert chaos.num_rank_restarts > 0
    # Who is killed from outside has no broken device.
    assert chaos.layout == LAYOUT
    assert chaos.num_left_processes == 0
    assert chaos.before is not None
    assert chaos.after is not None
    assert chaos.after.server_memory_bytes <= chaos.before.server_memory_bytes + SPARE_MEMORY_BYTES
    spare_descriptors = chaos.before.num_server_descriptors + POOLED_DESCRIPTORS
    assert chaos.after.num_server_descriptors <= spare_descriptors
    assert chaos.after.max_rank_descriptors <= chaos.before.max_rank_descriptors
