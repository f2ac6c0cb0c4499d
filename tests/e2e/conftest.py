from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from hidream.v1 import job_pb2
from tests.support.job_calls import Stub, cancel, listed
from tests.support.live_server import LiveServer, running_server

NOT_ENDED = (job_pb2.JOB_STATE_QUEUED, job_pb2.JOB_STATE_RUNNING)


@dataclass(frozen=True)
class NarrowServer:
    """One rank, one job at a time, room for few that wait, and images in small pieces."""

    live: LiveServer
    data_dir: Path
    max_queued_jobs: int = 3
    chunk_bytes: int = 1024

    def files_of(self, job_id: str) -> list[Path]:
        """What is on the disk of one job, its row apart."""
        return [path for path in self.data_dir.rglob(f"*{job_id}*/**/*") if path.is_file()]


@pytest.fixture(scope="session")
def narrow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NarrowServer]:
    """One narrow server for all tests that leave no job behind."""
    data_dir = tmp_path_factory.mktemp("narrow")
    flags = {
        "--data-dir": data_dir,
        "--devices": 0,
        "--max-running-jobs": 1,
        "--max-queued-jobs": NarrowServer.max_queued_jobs,
        "--chunk-bytes": NarrowServer.chunk_bytes,
        "--grace-seconds": 1,
    }
    with running_server(*(str(word) for flag in flags.items() for word in flag)) as live:
        yield NarrowServer(live, data_dir)


@pytest.fixture
def narrow(narrow_server: NarrowServer) -> Iterator[Stub]:
    """A plain stub of the narrow server; no job waits or runs when the test is over."""
    with narrow_server.live.stub() as stub:
        yield stub
        for job_id in listed(stub, states=NOT_ENDED):
            cancel(stub, job_id)
    narrow_server.live.wait_until_idle()
