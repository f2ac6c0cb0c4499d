from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.jobs.service_bench import Bench, bench_in


@pytest.fixture
async def bench(tmp_path: Path) -> Bench:
    return bench_in(tmp_path)
