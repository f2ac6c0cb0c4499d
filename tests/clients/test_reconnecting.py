from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from google.protobuf import duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2

from hidream.downloads import part_path
from hidream.errors import (
    InternalError,
    ServerError,
    StreamError,
    TooBusyForDeadlineError,
    UnavailableError,
)
from hidream.events import ImageFinished, Progress, Succeeded
from hidream.reconnecting import ReconnectPolicy
from hidream.v1 import job_pb2
from hidream.watching import JobChange
from tests.clients.breaking_server import (
    CHUNK_BYTES,
    FILE,
    JOB_ID,
    BreakingImageGen,
    breaking_image_gen,
    serving,
)
from tests.clients.either_client import EitherClient
from tests.clients.test_hidream_command import hidream

KINDS = ["Queued", "Started", "Progress", "Progress", "Progress", "ImageFinished", "Succeeded"]
NUM_EVENTS = len(breaking_image_gen().events)


@pytest.fixture(params=[False, True], ids=["sync", "asyncio"])
def is_async(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def server() -> Iterator[tuple[BreakingImageGen, str]]:
    servicer = breaking_image_gen()
    with serving(servicer) as address:
        yield servicer, address


@pytest.fixture
def either(server: tuple[BreakingImageGen, str], is_async: bool) -> EitherClient:
    return EitherClient(is_async, server[1])


@pytest.mark.parametrize("num_sent", range(1, NUM_EVENTS))
def test_a_watch_that_breaks_anywhere_misses_nothing_and_gets_nothing_twice(
    num_sent: int, server: tuple[BreakingImageGen, str], either: EitherClient
) -> None:
    server[0].breaks = [num_sent]
    events = either.items("watch", JOB_ID)
    assert [type(event).__name__ for event in events] == KINDS
    assert [event.step for event in events if isinstance(event, Progress)] == [1, 2, 3]
    [image] = [event.image.data for event in events if isinstance(event, ImageFinished)]
    assert image == FILE
    assert server[0].starts == [0, 10 * num_sent]


def test_a_watch_survives_any_number_of_breaks_and_says_each(
    server: tuple[BreakingImageGen, str], either: EitherClient
) -> None:
    server[0].breaks = [1, 0, 2, 0, 4]
    lost: list[ServerError] = []
    events = either.items("watch", JOB_ID, ReconnectPolicy(on_connection_lost=lost.append))
    assert isinstance(events[-1], Succeeded)
    assert [str(error) for error in lost] == ["the server is going away"] * 5
    assert server[0].starts == [0, 10, 10, 30, 30, 70]


def test_a_watch_gives_up_when_it_gets_no_answer_for_too_long(
    server: tuple[BreakingImageGen, str], either: EitherClient
) -> None:
    server[0].breaks = [2, *[0] * 1000]
    with pytest.raises(UnavailableError, match="the server is going away"):
        either.items("watch", JOB_ID, ReconnectPolicy(reconnect_seconds=0.3))
    # One attempt more at least, however long the process stood still in between.
    assert 2 <= len(server[0].starts) < 1000


def test_a_first_call_that_is_not_answered_is_not_repeated(
    server: tuple[BreakingImageGen, str], either: EitherClient
) -> None:
    server[0].breaks = [0]
    with pytest.raises(UnavailableError):
        either.items("watch", JOB_ID)
    assert server[0].starts == [0]


def test_an_error_that_another_call_would_meet_again_ends_the_watch(
    server: tuple[BreakingImageGen, str], either: EitherClient
) -> None:
    server[0].breaks, server[0].code = [2], grpc.StatusCode.INTERNAL
    with pytest.raises(InternalError):
        either.items("watch", JOB_ID)
    assert server[0].starts == [0]


def test_a_call_that_is_refused_for_its_deadline_is_not_made_again_with_a_shorter_one(
    server: tuple[BreakingImageGen, str], either: EitherClient
) -> None:
    refused = status_pb2.Status(code=code_pb2.RESOURCE_EXHAUSTED, message="too many jobs are in front")
    violation = error_details_pb2.QuotaFailure.Violation(subject="deadline", quota_id="deadline")
    refused.details.add().Pack(error_details_pb2.QuotaFailure(violations=[violation]))
    refused.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(nanos=10**6)))
    server[0].breaks, server[0].status = [2], refused
    with pytest.raises(TooBusyForDeadlineError):
        either.items("generate", "a")
    assert len(server[0].generated) == 1


def test_watching_all_jobs_tells_each_change_once_however_often_it_breaks(
    server: tuple[BreakingImageGen, str], either: EitherClient
) -> None:
    server[0].breaks = [2, 1]
    changes: list[JobChange] = either.items("watch_all", limit=3)
    assert [change.job.state for change in changes] == [
        job_pb2.JOB_STATE_QUEUED,
        job_pb2.JOB_STATE_RUNNING,
        job_pb2.JOB_STATE_SUCCEEDED,
    ]


def test_a_download_that_breaks_off_goes_on_at_the_next_byte(
    server: tuple[BreakingImageGen, str], either: EitherClient, tmp_path: Path
) -> None:
    server[0].breaks = [3, 0, 1]
    either.download(tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes() == FILE
    assert server[0].starts == [0, 3 * CHUNK_BYTES, 3 * CHUNK_BYTES, 4 * CHUNK_BYTES]
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]


def test_a_download_goes_on_from_what_an_earlier_one_has_left(
    server: tuple[BreakingImageGen, str], either: EitherClient, tmp_path: Path
) -> None:
    server[0].breaks, path = [3], tmp_path / "a.png"
    with pytest.raises(UnavailableError, match=rf"\(job {JOB_ID}\)"):
        either.download(path, ReconnectPolicy(reconnect_seconds=0))
    assert not path.exists()
    assert part_path(path, JOB_ID, 0).read_bytes() == FILE[: 3 * CHUNK_BYTES]
    either.download(path)
    assert path.read_bytes() == FILE
    assert server[0].starts == [0, 3 * CHUNK_BYTES]
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_only_lacked_its_name_is_not_downloaded_again(
    server: tuple[BreakingImageGen, str], either: EitherClient, tmp_path: Path
) -> None:
    path = tmp_path / "a.png"
    part_path(path, JOB_ID, 0).write_bytes(FILE)
    either.download(path)
    assert path.read_bytes() == FILE
    assert server[0].starts == []


@pytest.mark.parametrize("left", [b"other bytes", FILE + b"too many"], ids=["other bytes", "too many bytes"])
def test_a_download_with_another_sha256_is_no_file_and_the_next_one_begins_anew(
    left: bytes, server: tuple[BreakingImageGen, str], either: EitherClient, tmp_path: Path
) -> None:
    path = tmp_path / "a.png"
    part_path(path, JOB_ID, 0).write_bytes(left)
    with pytest.raises(StreamError, match="another SHA-256 than announced"):
        either.download(path)
    assert not list(tmp_path.iterdir())
    either.download(path)
    assert path.read_bytes() == FILE


def command(address: str, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    result = hidream(address, *arguments, folder=folder)
    assert result.returncode == 0, result.stderr
    return result


def test_the_bar_of_a_watch_goes_on_after_a_break(
    server: tuple[BreakingImageGen, str], tmp_path: Path
) -> None:
    server[0].breaks = [3, 0]
    result = command(server[1], "watch", JOB_ID, "--out", "a.png", folder=tmp_path)
    assert result.stdout == "a.png\n"
    assert (tmp_path / "a.png").read_bytes() == FILE
    shown = result.stderr
    assert shown.index("step 1 of 3") < shown.index("connection lost, trying again")
    assert shown.index("connection lost, trying again") < shown.index("step 2 of 3")
    assert "connection lost" not in shown[shown.index("step 2 of 3") :]


def test_watch_prints_each_event_once_as_json(server: tuple[BreakingImageGen, str], tmp_path: Path) -> None:
    server[0].breaks = [3, 1, 5]
    result = command(server[1], "watch", JOB_ID, "--json", folder=tmp_path)
    events = [json.loads(line) for line in result.stdout.splitlines()]
    assert [event["event"] for event in events] == [
        *("queued", "started", "progress", "progress", "progress", "image_finished", "succeeded")
    ]
    assert result.stderr == ""


@pytest.mark.parametrize("command_name", ["watch", "download"])
def test_a_file_is_not_named_after_another_format(
    command_name: str, server: tuple[BreakingImageGen, str], tmp_path: Path
) -> None:
    result = hidream(server[1], command_name, JOB_ID, "--out", "a.webp", folder=tmp_path)
    assert result.returncode == 2
    assert "'a.webp' is no name of a png file" in result.stderr
    assert not list(tmp_path.iterdir())


def test_waiting_for_a_job_outlasts_a_lost_connection_and_the_log_tells_of_it(
    server: tuple[BreakingImageGen, str], is_async: bool, caplog: pytest.LogCaptureFixture
) -> None:
    server[0].breaks = [3]
    assert EitherClient(is_async, server[1]).waited() == server[0].job
    assert server[0].starts == [0, 30]
    [record] = [record for record in caplog.records if record.name.startswith("hidream.")]
    assert record.levelname == "WARNING"
    assert "connection lost, trying again in" in record.getMessage()
