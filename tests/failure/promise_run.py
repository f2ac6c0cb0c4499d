"""One run of the failure harness: callers call, things fail, all is well, and the promises are checked."""

from __future__ import annotations

import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass

import grpc

from hidream.v1 import image_gen_pb2, image_gen_pb2_grpc, job_pb2
from scripts.chaos.chaos_requests import PIXEL_TOLERANCE, largest_difference
from tests.failure.callers import (
    CALL_SECONDS,
    IMAGE_REQUESTS,
    Caller,
    Dashboard,
    Replica,
    Stage,
    Watcher,
    downloaded,
    submitted,
)
from tests.failure.fault_schedule import Fault, FaultSchedule
from tests.failure.faulty_servers import FaultyServer
from tests.failure.history import ENDS, FinalJob, History, OpenStream
from tests.failure.promises import SILENT_SECONDS, Breach, breaches, count_by_rule
from tests.support.live_server import wait_until

NUM_CALLERS = 6
MAX_THREADS = 300
END_SECONDS = 60.0
"""For every job to end, when all is well again."""
SETTLE_SECONDS = 30.0
"""Seconds in which files that no row names are removed, when every job has ended."""


@dataclass(frozen=True, slots=True)
class Counts:
    """What happened in a run."""

    seed: str
    seconds: float
    jobs_acknowledged: int
    jobs_by_state: Mapping[str, int]
    faults: Mapping[str, int]
    events: int
    reconnects: int
    refusals: Mapping[str, int]
    images_compared: int
    downloads: int
    breaches: Mapping[str, int]

    def line(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self))


@dataclass(frozen=True, slots=True)
class Setup:
    """What a run works on.

    Attributes:
        faults: by victim.
        stored_files: the paths of all images and snapshots, now.
    """

    servers: Sequence[FaultyServer]
    faults: Mapping[str, Sequence[Fault]]
    stored_files: Callable[[], list[str]]


class PromiseRun:
    """One run; the seed decides who does what, and what fails: moments still vary with the machine.

    Args:
        kinds: names of the faults to play; all when empty.
    """

    def __init__(self, setup: Setup, seed: str, seconds: float, kinds: Sequence[str] = ()) -> None:
        self._setup = setup
        self._seed = seed
        self._seconds = seconds
        self._schedule = FaultSchedule(setup.faults, f"{seed} faults", seconds, kinds)
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self.history = History()

    def run(self) -> tuple[Counts, list[Breach]]:
        """Do it all; what happened, and the promises that were not kept."""
        with ExitStack() as stack:
            replicas = [
                Replica(server.name, image_gen_pb2_grpc.ImageGenStub(stack.enter_context(_channel(server))))
                for server in self._setup.servers
            ]
            stage = Stage(replicas, self.history)
            stack.callback(self._close, stage)
            self._draw_alone(stage, "before")
            self._disturb(stage)
            well_seconds = time.monotonic()
            self._wait_for_ends(stage)
            dashboards_hear = self._probe(stage)
            self._find_hanging(stage, well_seconds, dashboards_hear)
            self._close(stage)
            # Nobody waits for what was left behind.
            last = Stage(replicas, self.history, images=stage.images)
            if all(final.state in ENDS.values() for final in self._finals(last, with_images=False)):
                self._draw_alone(last, "after")
            self.history.final_jobs = self._finals(last, with_images=True)
            self.history.num_listed_images = _num_listed_images(replicas[0])
            self._read_files()
            found = breaches(self.history, lambda one, other: _differ(last.images, one, other))
            return self._counts(found), found

    # --- the run ----------------------------------------------------------------------------------

    def _draw_alone(self, stage: Stage, when: str) -> None:
        """Generate each image once while nothing else happens, at one replica after the other."""
        # Where one never ends the checker says so.
        timer = threading.Timer(END_SECONDS, stage.is_closed.set)
        timer.start()
        try:
            self._draw_each_alone(stage, when)
        finally:
            timer.cancel()
            timer.join()

    def _draw_each_alone(self, stage: Stage, when: str) -> None:
        for number, image_request in enumerate(IMAGE_REQUESTS):
            order = [*stage.replicas[number % len(stage.replicas) :], *stage.replicas]
            request_id = f"alone-{when}-{number}"
            job_id = submitted(stage, order, request_id, image_request, is_alone=True)
            name = f"alone {when} {number}"
            Watcher(stage, name, job_id, random.Random(number), is_patient=False).run()

    def _disturb(self, stage: Stage) -> None:
        """Have everybody call while things fail; all is well when this returns."""
        self._dashboards = [Dashboard(stage, replica) for replica in stage.replicas]
        for dashboard in self._dashboards:
            self._start("dashboard", dashboard.run)
        callers = [
            Caller(stage, f"caller-{number}", f"{self._seed} {number}", self._start)
            for number in range(NUM_CALLERS)
        ]
        for caller in callers:
            self._start("caller", caller.run)
        self._schedule.start()
        try:
            self._schedule.wait()
        finally:
            self._schedule.stop()
            for server in self._setup.servers:
                server.wake()
                server.clock.step_to(0.0)
                if server.proxy is not None:
                    server.proxy.heal()
            stage.is_over.set()

    def _start(self, name: str, run: Callable[[], None]) -> None:
        thread = threading.Thread(target=run, name=name, daemon=True)
        with self._lock:
            self._threads = [each for each in self._threads if each.is_alive()]
            if len(self._threads) >= MAX_THREADS:
                return
            self._threads.append(thread)
        thread.start()

    def _close(self, stage: Stage) -> None:
        """Cancel what is still open, and wait for those who read it."""
        stage.is_over.set()
        stage.is_closed.set()
        deadline = time.monotonic() + 4 * CALL_SECONDS
        for thread in tuple(self._threads):
            while thread.is_alive() and time.monotonic() < deadline:
                for opened in tuple(stage.open_calls.values()):
                    opened.call.cancel()
                thread.join(0.1)

    # --- when all is well again --------------------------------------------------------------------

    def _wait_for_ends(self, stage: Stage) -> None:
        """Wait until every job has ended, at every replica; in vain if one never does."""

        def have_ended() -> bool:
            return all(_num_open_jobs(replica) == 0 for replica in stage.replicas)

        try:
            wait_until(have_ended, END_SECONDS, "every job has ended")
        except AssertionError:
            # The checker says which.
            return

    def _probe(self, stage: Stage) -> list[str]:
        """Draw once more; the replicas whose dashboards were told of its end."""
        job_id = submitted(stage, stage.replicas, "probe", IMAGE_REQUESTS[0])
        deadline = time.monotonic() + SILENT_SECONDS
        while time.monotonic() < deadline:
            hear = [
                replica.name
                for replica, dashboard in zip(stage.replicas, self._dashboards, strict=True)
                if dashboard.seen.get(job_id) in ENDS.values()
            ]
            if len(hear) == len(stage.replicas):
                break
            time.sleep(0.05)
        return hear

    def _find_hanging(self, stage: Stage, well_seconds: float, dashboards_hear: list[str]) -> None:
        """Note the streams of jobs that have ended which are open, and say nothing."""
        deadline = time.monotonic() + SILENT_SECONDS + 1.0

        def hanging() -> list[OpenStream]:
            found = []
            for opened in tuple(stage.open_calls.values()):
                silent_seconds = time.monotonic() - max(opened.last_seconds, well_seconds)
                if opened.job_id or not opened.reader.startswith("dashboard"):
                    found.append(OpenStream(opened.reader, opened.replica, opened.job_id, silent_seconds))
            return found

        while hanging() and time.monotonic() < deadline:
            time.sleep(0.05)
        deaf = [replica.name for replica in stage.replicas if replica.name not in dashboards_hear]
        self.history.open_streams = hanging() + [
            OpenStream(f"dashboard of {name}", name, "probe", SILENT_SECONDS + 1.0) for name in deaf
        ]

    def _finals(self, stage: Stage, *, with_images: bool) -> list[FinalJob]:
        job_ids = dict.fromkeys(each.job_id for each in self.history.acknowledged)
        return [
            _final(stage, replica, job_id, with_images=with_images)
            for job_id in job_ids
            for replica in stage.replicas
        ]

    def _read_files(self) -> None:
        """Read which files there are, when those that no row names have had their time to go."""
        deadline = time.monotonic() + SETTLE_SECONDS
        while True:
            self.history.stored_files = self._setup.stored_files()
            found = count_by_rule(breaches(self.history, lambda _one, _other: False))
            if "no file without a row" not in found or time.monotonic() > deadline:
                return
            time.sleep(0.5)

    def _counts(self, found: list[Breach]) -> Counts:
        history = self.history
        states = {final.job_id: final.state or "unknown" for final in history.final_jobs}
        refusals = Counter(f"{call} {code}" for call, code in history.refusals)
        return Counts(
            seed=self._seed,
            seconds=self._seconds,
            jobs_acknowledged=len(states),
            jobs_by_state=dict(sorted(Counter(states.values()).items())),
            faults=dict(sorted(self._schedule.played.items())),
            events=len(history.told),
            reconnects=history.num_reconnects,
            refusals=dict(sorted(refusals.items())),
            images_compared=sum(len(final.images) for final in history.final_jobs),
            downloads=len(history.downloads),
            breaches=count_by_rule(found),
        )


def _channel(server: FaultyServer) -> grpc.Channel:
    return grpc.insecure_channel(server.live.address)


def _num_open_jobs(replica: Replica) -> int:
    """Jobs that wait or run, as a replica tells; one when it does not answer."""
    states = (job_pb2.JOB_STATE_QUEUED, job_pb2.JOB_STATE_RUNNING)
    try:
        message = image_gen_pb2.ListJobsRequest(states=states, page_size=1)
        return len(replica.stub.ListJobs(message, timeout=CALL_SECONDS).jobs)
    except grpc.RpcError:
        return 1


def _num_listed_images(replica: Replica) -> dict[str, int]:
    """How many images each job has that a replica lists."""
    found: dict[str, int] = {}
    message = image_gen_pb2.ListJobsRequest(page_size=1000)
    while True:
        page = replica.stub.ListJobs(message, timeout=CALL_SECONDS)
        found.update((job.job_id, len(job.images)) for job in page.jobs)
        message.page_token = page.next_page_token
        if not message.page_token:
            return found


def _final(stage: Stage, replica: Replica, job_id: str, *, with_images: bool) -> FinalJob:
    """A job as a replica tells of it, with its images as they are downloaded there."""
    try:
        job = replica.stub.GetJob(image_gen_pb2.GetJobRequest(job_id=job_id), timeout=CALL_SECONDS)
    except grpc.RpcError as error:
        return FinalJob(job_id, replica.name, "", error=stage.code("GetJob", error).name)
    times = [
        time.ToNanoseconds() if job.HasField(name) else 0  # type: ignore[arg-type]
        for name, time in (
            ("create_time", job.create_time),
            ("start_time", job.start_time),
            ("end_time", job.end_time),
        )
    ]
    timings = [duration.ToTimedelta().total_seconds() for _, duration in job.timings.ListFields()]
    images = [downloaded(stage, replica, job_id, info) for info in job.images] if with_images else []
    return FinalJob(
        job_id,
        replica.name,
        job_pb2.JobState.Name(job.state).removeprefix("JOB_STATE_"),
        (times[0], times[1], times[2]),
        min(timings, default=0.0),
        tuple(images),
        error=job.error.message,
    )


def _differ(images: Mapping[str, bytes], one: str, other: str) -> bool:
    if one not in images or other not in images:
        return True
    return largest_difference(images[one], images[other]) > PIXEL_TOLERANCE
