"""One folder, one server after the other: what was accepted is there, until it is too old or too much."""

from __future__ import annotations

import hashlib
import signal
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from hidream.v1 import image_gen_pb2, job_pb2, server_info_pb2
from tests.support.job_calls import (
    WAIT_SECONDS,
    Stub,
    calls_about,
    cancel,
    downloaded,
    drawn,
    events,
    get,
    listed,
    not_found,
    read_stream,
    refusal,
    running,
    submit,
    watch,
)
from tests.support.live_server import LiveServer, running_server, wait_until
from tests.support.prometheus_samples import scrape

LABEL = {"life": "first"}
LONG_ENOUGH_STEPS = 60
"""To be drawn still when the calls of this test are made, and to end within the grace period."""
GRACE_SECONDS = 60.0
RETENTION_SECONDS = 3.0

SUCCEEDED = job_pb2.JOB_STATE_SUCCEEDED
Read = tuple[list[Any], grpc.StatusCode]


@dataclass
class FirstLife:
    """What a server was asked, and what it told, before and while it went away."""

    data_dir: Path
    ended: job_pb2.Job
    cancelled: job_pb2.Job
    running_id: str
    waiting_ids: list[str]
    page: image_gen_pb2.ListJobsResponse
    told_of_ended: list[job_pb2.JobEvent]
    images: list[bytes]
    refused_with: grpc.StatusCode | None = None
    retry_seconds: float = 0.0
    answered: job_pb2.Job | None = None
    downloaded: bytes = b""
    exit_code: int | None = None
    reads: dict[str, Read] = field(default_factory=dict)

    @property
    def job_ids(self) -> list[str]:
        """Newest first."""
        return [*self.waiting_ids[::-1], self.running_id, self.cancelled.job_id, self.ended.job_id]


def flags(data_dir: Path, *more: str) -> tuple[str, ...]:
    """Flags of a server that runs one job at a time, and sends images in small chunks."""
    common = (
        "--data-dir",
        str(data_dir),
        "--devices",
        "0",
        "--max-running-jobs",
        "1",
        "--chunk-bytes",
        "1024",
    )
    return (*common, "--grace-seconds", str(GRACE_SECONDS), *more)


def begun(stub: Stub, data_dir: Path) -> FirstLife:
    """Jobs in every state."""
    ended = drawn(stub, num_images=2, labels=LABEL, request_id="first")
    cancelled = submit(stub, labels=LABEL, num_inference_steps=150)
    cancel(stub, cancelled.job_id)
    (*_, last) = events(stub, cancelled.job_id)
    assert last.HasField("cancelled")
    running_id = running(stub, labels=LABEL, num_inference_steps=LONG_ENOUGH_STEPS, width=128, height=128)
    return FirstLife(
        data_dir,
        ended,
        get(stub, cancelled.job_id),
        running_id,
        [submit(stub, labels=LABEL, seed=seed, num_inference_steps=5).job_id for seed in (1, 2)],
        stub.ListJobs(image_gen_pb2.ListJobsRequest(labels=LABEL, page_size=3)),
        events(stub, ended.job_id, events(stub, ended.job_id)[0].sequence),
        [downloaded(stub, ended.job_id, index) for index in (0, 1)],
    )


def drained(server: LiveServer, stub: Stub, life: FirstLife) -> None:
    """Have the server go away, ask it meanwhile, and read its streams to their ends."""
    calls = {job_id: watch(stub, job_id) for job_id in (life.running_id, *life.waiting_ids)}
    calls["all"] = stub.WatchJobs(image_gen_pb2.WatchJobsRequest(labels=LABEL))
    with ThreadPoolExecutor() as threads:
        firsts = {name: next(call) for name, call in calls.items()}
        reads: dict[str, Future[Read]] = {name: threads.submit(read_stream, c) for name, c in calls.items()}
        server.process.send_signal(signal.SIGTERM)
        wait_until(
            lambda: server.info().state == server_info_pb2.SERVER_STATE_DRAINING, WAIT_SECONDS, "it drains"
        )
        try:
            submit(stub)
        except grpc.RpcError as error:
            life.refused_with = error.code()
            life.retry_seconds = retry_seconds(error)
        life.answered = get(stub, life.ended.job_id)
        life.downloaded = downloaded(stub, life.ended.job_id)
        life.exit_code = server.process.wait(GRACE_SECONDS)
        for name, read in reads.items():
            messages, code = read.result(WAIT_SECONDS)
            life.reads[name] = ([firsts[name], *messages], code)


def retry_seconds(error: grpc.RpcError) -> float:
    """What a refusal says about when to come back."""
    status = rpc_status.from_call(error)
    assert status is not None
    retry = error_details_pb2.RetryInfo()
    assert status.details[0].Unpack(retry)
    return float(retry.retry_delay.ToTimedelta().total_seconds())


@pytest.fixture(scope="module")
def life(tmp_path_factory: pytest.TempPathFactory) -> FirstLife:
    """A server with jobs in every state, which was sent SIGTERM."""
    data_dir = tmp_path_factory.mktemp("lives")
    with running_server(*flags(data_dir)) as server, server.stub() as stub:
        life = begun(stub, data_dir)
        drained(server, stub, life)
    return life


@pytest.fixture(scope="module")
def second_server(life: FirstLife) -> Iterator[LiveServer]:
    """The next server on the same folder; it would remove all but one job, and only says so."""
    more = ("--metrics-port", "0", "--max-retained-jobs", "1", "--retention-dry-run", "true")
    with running_server(*flags(life.data_dir, *more)) as server:
        yield server


@pytest.fixture
def second(second_server: LiveServer) -> Iterator[Stub]:
    with second_server.stub() as stub:
        yield stub


def test_a_server_that_drains_ends_what_runs_and_exits_well(life: FirstLife) -> None:
    assert life.exit_code == 0
    responses, code = life.reads[life.running_id]
    assert code == grpc.StatusCode.OK
    assert responses[-1].event.succeeded.job.state == SUCCEEDED


def test_a_server_that_drains_accepts_nothing_and_answers_for_what_is_there(life: FirstLife) -> None:
    assert life.refused_with == grpc.StatusCode.UNAVAILABLE
    assert life.retry_seconds > 0
    assert life.answered == life.ended
    assert life.downloaded == life.images[0]


def test_who_watches_what_waits_is_told_that_the_server_goes_away(life: FirstLife) -> None:
    for job_id in life.waiting_ids:
        responses, code = life.reads[job_id]
        assert code == grpc.StatusCode.UNAVAILABLE
        assert {response.event.WhichOneof("event") for response in responses} == {"queued"}


def test_who_watches_all_jobs_is_told_every_end_and_that_the_server_goes_away(life: FirstLife) -> None:
    changes, code = life.reads["all"]
    assert code == grpc.StatusCode.UNAVAILABLE
    assert {change.job.job_id for change in changes} == set(life.job_ids)
    states = [change.job.state for change in changes if change.job.job_id == life.running_id]
    assert states == [job_pb2.JOB_STATE_RUNNING, SUCCEEDED]


def test_the_next_server_knows_every_job(life: FirstLife, second: Stub) -> None:
    assert get(second, life.ended.job_id) == life.ended
    assert get(second, life.cancelled.job_id) == life.cancelled
    assert get(second, life.running_id) == life.reads[life.running_id][0][-1].event.succeeded.job
    assert listed(second, labels=LABEL) == life.job_ids


def test_a_page_token_outlives_its_server(life: FirstLife, second: Stub) -> None:
    rest = listed(second, labels=LABEL, page_token=life.page.next_page_token)
    assert [*(job.job_id for job in life.page.jobs), *rest] == life.job_ids


def test_what_had_ended_is_told_and_downloads_as_before(life: FirstLife, second: Stub) -> None:
    started, *rest = events(second, life.ended.job_id)
    assert started.HasField("started")
    assert rest == life.told_of_ended
    for image, data in zip(life.ended.images, life.images, strict=True):
        assert downloaded(second, life.ended.job_id, image.index) == data
        assert hashlib.sha256(data).digest() == image.sha256


def test_a_request_id_outlives_its_server(life: FirstLife, second: Stub) -> None:
    assert submit(second, num_images=2, labels=LABEL, request_id="first") == life.ended
    (resource,) = refusal(
        lambda: submit(second, request_id="first"),
        grpc.StatusCode.ALREADY_EXISTS,
        error_details_pb2.ResourceInfo(),
    )
    assert resource.resource_name == life.ended.job_id


def test_what_waited_is_drawn_and_its_watcher_goes_on_behind_the_last_event(
    life: FirstLife, second: Stub
) -> None:
    for job_id in life.waiting_ids:
        last_sequence = life.reads[job_id][0][-1].event.sequence
        told = events(second, job_id, last_sequence)
        sequences = [last_sequence, *(event.sequence for event in told)]
        assert sequences == sorted(set(sequences))
        job = told[-1].succeeded.job
        assert job == get(second, job_id)
        assert job.execution.attempt == 1
        assert hashlib.sha256(downloaded(second, job_id)).digest() == job.images[0].sha256


def test_a_dry_run_of_retention_tells_what_would_go_and_keeps_it(
    life: FirstLife, second_server: LiveServer, second: Stub
) -> None:
    for job_id in life.job_ids:
        events(second, job_id)
    jobs = [get(second, job_id) for job_id in life.job_ids]
    image_bytes = sum(image.size_bytes for job in jobs for image in job.images)
    wait_until(
        lambda: scrape(second_server).value("hidream_store_retained_jobs") == len(jobs),
        WAIT_SECONDS,
        "all that was drawn is counted",
    )
    samples = scrape(second_server)
    assert samples.value("hidream_store_retained_bytes") == image_bytes
    assert samples.value("hidream_removed_jobs_total", reason="number") == 0

    def would_go(job_id: str) -> bool:
        lines = [line for line in second_server.log_lines if "would be removed (dry run)" in line]
        return any(job_id in line for line in lines)

    oldest = sorted(jobs, key=lambda job: job.end_time.ToNanoseconds())[:-1]
    wait_until(lambda: all(would_go(job.job_id) for job in oldest), WAIT_SECONDS, "the log names them")
    assert downloaded(second, life.ended.job_id) == life.images[0]


def test_jobs_go_with_their_images_when_they_are_too_old_and_when_they_are_too_much(tmp_path: Path) -> None:
    max_bytes = 10_000
    more = ("--retention-seconds", str(RETENTION_SECONDS), "--max-retained-bytes", str(max_bytes))
    with running_server(*flags(tmp_path, *more, "--metrics-port", "0")) as server, server.stub() as stub:

        def ended(**spec: int) -> job_pb2.Job:
            return events(stub, submit(stub, **spec).job_id)[-1].succeeded.job

        def removed(reason: str) -> float:
            return scrape(server).value("hidream_removed_jobs_total", reason=reason)

        def kept() -> tuple[float, float]:
            samples = scrape(server)
            return samples.value("hidream_store_retained_jobs"), samples.value("hidream_store_retained_bytes")

        def is_too_old(job: job_pb2.Job) -> bool:
            # When a reader leaves, the server looks what has become too old meanwhile.
            read_stream(stub.DownloadImage(image_gen_pb2.DownloadImageRequest(job_id=job.job_id)))
            return removed("age") == 1

        large = ended(width=256, height=256, num_inference_steps=1)
        assert large.images[0].size_bytes > max_bytes
        wait_until(lambda: removed("bytes") == 1, WAIT_SECONDS, "it was too much")
        small = ended()
        size_bytes = small.images[0].size_bytes
        assert size_bytes < max_bytes
        wait_until(lambda: kept() == (1, size_bytes), WAIT_SECONDS, "it is kept")
        wait_until(lambda: is_too_old(small), WAIT_SECONDS, "it was too old")
        assert kept() == (0, 0)
        assert (removed("bytes"), removed("number")) == (1, 0)
        folders = [tmp_path / "artifacts" / name for name in ("images", "snapshots")]
        assert [path for folder in folders for path in folder.rglob("*") if path.is_file()] == []
        for job in (large, small):
            for call in calls_about(stub, job.job_id).values():
                not_found(call)
        assert listed(stub) == []
