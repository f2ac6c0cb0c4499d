from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import cast

import pytest

from hidream_grpc.errors import ArtifactUnavailableError
from hidream_grpc.jobs.artifacts import probe as artifact_probe
from hidream_grpc.jobs.artifacts.artifacts import PROBE_KEY, ArtifactStore
from hidream_grpc.jobs.artifacts.probe import ArtifactProbe
from tests.unit.jobs.service_bench import Bench, bench_in, submission, until

REFUSED = ArtifactUnavailableError(5.0, "refused")


class AskedArtifacts:
    """Answers a probe as the test has it."""

    def __init__(self) -> None:
        self.num_probes = 0
        self.max_call_seconds = 0.0
        self.answer: Callable[[], None] | None = lambda: None
        self.observe_call: Callable[[bool, ArtifactUnavailableError | None], None] = lambda is_write, error: (
            None
        )

    async def probe(self) -> None:
        self.num_probes += 1
        if self.answer is None:
            await asyncio.Event().wait()
        else:
            self.answer()

    async def are_probed(self, num_probes: int) -> None:
        """Wait for so many whole probes."""
        until_num_probes = self.num_probes + num_probes + 1
        await until(lambda: self.num_probes >= until_num_probes)


@asynccontextmanager
async def probing(
    monkeypatch: pytest.MonkeyPatch, max_outage_seconds: float
) -> AsyncIterator[tuple[AskedArtifacts, ArtifactProbe, list[bool]]]:
    monkeypatch.setattr(artifact_probe, "PROBE_SECONDS", 0.001)
    monkeypatch.setattr(artifact_probe, "RETRY_SECONDS", 0.001)
    artifacts, changes = AskedArtifacts(), list[bool]()
    probe = ArtifactProbe(
        cast(ArtifactStore, artifacts), max_outage_seconds, lambda: changes.append(probe.is_usable)
    )
    task = asyncio.create_task(probe.run())
    try:
        await until(lambda: artifacts.num_probes > 0)
        yield artifacts, probe, changes
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def refuse() -> None:
    raise REFUSED


async def test_a_store_that_refuses_is_an_outage_after_a_while_and_healed_by_one_answer(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with probing(monkeypatch, 0.05) as (artifacts, probe, changes):
        artifacts.answer = refuse
        await until(lambda: probe.failure == "refused")
        await until(lambda: changes == [False])
        artifacts.answer = lambda: None
        await until(lambda: probe.failure is None)
        assert changes == [False, True]
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warnings == ["the artifact store is not available: refused; new jobs are refused"]


async def test_a_store_that_says_nothing_is_an_outage_too(monkeypatch: pytest.MonkeyPatch) -> None:
    async with probing(monkeypatch, 0.05) as (artifacts, probe, changes):
        artifacts.answer = None
        await until(lambda: changes == [False])
        assert probe.failure == "no answer for 0.05 s"


async def test_no_probe_speaks_for_images_that_are_refused_all_the_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with probing(monkeypatch, 60.0) as (artifacts, probe, _):

        def take_a_probe_and_refuse_an_image() -> None:
            artifacts.observe_call(True, REFUSED)

        artifacts.answer = take_a_probe_and_refuse_an_image
        await until(lambda: artifacts.num_probes > 2)
        num_probes = artifacts.num_probes
        await until(lambda: artifacts.num_probes > num_probes + 3)
        assert probe.failure == "refused"
        # An image that is taken says it at once.
        artifacts.observe_call(True, None)
        assert probe.failure is None


class NotedTimer:
    """Measures no time: the test asks whether an outage is being measured."""

    def __init__(self, max_outage_seconds: float, on_end: Callable[[], None]) -> None:
        self.is_running = False

    def start(self) -> None:
        self.is_running = True

    def stop(self) -> None:
        self.is_running = False


async def test_an_image_that_is_stored_during_a_probe_leaves_no_outage_to_be_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    timers = list[NotedTimer]()

    def noted_timer(max_outage_seconds: float, on_end: Callable[[], None]) -> NotedTimer:
        timers.append(NotedTimer(max_outage_seconds, on_end))
        return timers[-1]

    monkeypatch.setattr(artifact_probe, "OutageTimer", noted_timer)
    async with probing(monkeypatch, 60.0) as (artifacts, probe, _):
        monkeypatch.setattr(artifact_probe, "PROBE_SECONDS", 60.0)
        num_probes = artifacts.num_probes

        def store_an_image() -> None:
            artifacts.observe_call(True, None)
            assert timers[0].is_running, "this probe has no answer yet"

        artifacts.answer = store_an_image
        artifacts.observe_call(True, REFUSED)
        await until(lambda: artifacts.num_probes > num_probes)
        await until(lambda: not timers[0].is_running)
        assert probe.failure is None


async def test_images_that_fail_slowly_are_one_outage_whatever_probes_say_meanwhile(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with probing(monkeypatch, 60.0) as (artifacts, probe, _):
        artifacts.max_call_seconds = 60.0
        for _ in range(3):
            artifacts.observe_call(True, REFUSED)
            await artifacts.are_probed(3)
            assert probe.failure == "refused"
        # Nobody stores anything any more: a probe tells.
        artifacts.max_call_seconds = 0.0
        await until(lambda: probe.failure is None)
    assert [record.getMessage() for record in caplog.records] == [
        "the artifact store is not available: refused; new jobs are refused",
        "the artifact store is available again",
    ]


async def test_servers_that_probe_one_store_at_once_do_not_see_each_other(tmp_path: Path) -> None:
    stores = [ArtifactStore(tmp_path) for _ in range(2)]
    await asyncio.gather(*(store.probe() for store in stores * 8))
    assert not (tmp_path / PROBE_KEY).exists()


async def test_a_store_that_gives_nothing_is_logged_once_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with probing(monkeypatch, 60.0) as (artifacts, probe, _):
        for _ in range(2):
            artifacts.observe_call(False, REFUSED)
            await artifacts.are_probed(2)
        artifacts.observe_call(False, None)
        assert probe.failure is None
    assert [record.getMessage() for record in caplog.records] == [
        "the artifact store cannot be read: refused",
        "the artifact store can be read again",
    ]


async def test_reads_that_fail_in_an_outage_have_no_line_of_their_own(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with probing(monkeypatch, 60.0) as (artifacts, probe, _):
        artifacts.answer = refuse
        artifacts.observe_call(False, REFUSED)
        await until(lambda: probe.failure is not None)
        artifacts.observe_call(False, REFUSED)
        artifacts.answer = lambda: None
        await artifacts.are_probed(2)
    assert len(caplog.records) == 1


async def test_there_is_no_probe_while_images_are_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = list[float]()
    async with probing(monkeypatch, 60.0) as (artifacts, _, _):

        async def store_images_meanwhile(event: asyncio.Event, seconds: float) -> bool:
            waits.append(seconds)
            if len(waits) > 3:
                await asyncio.Event().wait()
            artifacts.observe_call(True, None)
            return False

        monkeypatch.setattr(artifact_probe, "wait_at_most", store_images_meanwhile)
        num_probes = artifacts.num_probes
        await until(lambda: len(waits) > 3)
        # One may have been under way.
        assert artifacts.num_probes <= num_probes + 1


async def test_a_read_that_fails_is_no_failure_of_writes_and_has_them_probed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with probing(monkeypatch, 60.0) as (artifacts, probe, _):
        monkeypatch.setattr(artifact_probe, "PROBE_SECONDS", 60.0)
        num_probes = artifacts.num_probes
        artifacts.observe_call(False, REFUSED)
        assert probe.failure is None
        await until(lambda: artifacts.num_probes > num_probes)


@pytest.fixture
async def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Bench]:
    monkeypatch.setattr(artifact_probe, "PROBE_SECONDS", 0.01)
    monkeypatch.setattr(artifact_probe, "RETRY_SECONDS", 0.01)
    async with bench_in(tmp_path) as bench:
        yield bench


async def test_while_the_folder_of_images_is_away_only_new_jobs_are_refused(bench: Bench) -> None:
    kept = await bench.submit(submission("kept"))
    folder, away = bench.directory / "artifacts", bench.directory / "away"
    await until(folder.is_dir)
    folder.rename(away)
    await until(lambda: bench.service.readiness.refusal is not None)
    with pytest.raises(ArtifactUnavailableError) as refused:
        await bench.submit(submission("new"))
    assert refused.value.retry_after_seconds > 0
    assert (await bench.submit(submission("kept"))).job_id == kept.job_id, "a retry finds its job"
    away.rename(folder)
    await until(lambda: bench.service.readiness.refusal is None)
    assert await bench.submit(submission("new"))
    assert await bench.run() == kept.job_id
