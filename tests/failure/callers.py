"""Callers that draw, watch, cancel, leave and come back, again and again, and note what they are told.

Whatever a call answers while things fail, its caller goes on: with the same request id, or from the last
sequence, at any replica. Only what the answers say is recorded.
"""

from __future__ import annotations

import hashlib
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import grpc

from hidream.v1 import image_gen_pb2, image_gen_pb2_grpc, image_pb2, job_pb2
from tests.failure.history import (
    ENDS,
    Acknowledged,
    Cancelled,
    ChangeTold,
    Downloaded,
    FinalImage,
    History,
    ImageRequest,
    Told,
)

CALL_SECONDS = 8.0
ACTION_SECONDS = 12.0
PAUSE_SECONDS = 0.2
"""After a call that was answered with an error."""
IMAGE_REQUESTS = tuple(
    ImageRequest(prompt, side, num_steps, seed)
    for prompt, side, num_steps, seed in (
        ("a red circle on a blue background", 64, 4, 1),
        ("a yellow star", 64, 8, 2),
        ("two green squares", 64, 12, 3),
        ("a purple circle", 64, 6, 1),
        ("a blue triangle on a white background", 96, 10, 4),
    )
)
Stub = image_gen_pb2_grpc.ImageGenStub


@dataclass(frozen=True, slots=True)
class Replica:
    """Where callers call."""

    name: str
    stub: Stub


@dataclass
class OpenCall:
    """A stream that is being read.

    Attributes:
        last_seconds: monotonic, of its last news.
    """

    reader: str
    replica: str
    job_id: str
    call: Any
    last_seconds: float = field(default_factory=time.monotonic)


@dataclass
class Stage:
    """What all callers share.

    Attributes:
        is_over: once it is set, nobody begins anything.
        is_closed: once it is set, nobody waits for anything either.
        images: the files that were read, by SHA-256.
    """

    replicas: Sequence[Replica]
    history: History
    is_over: threading.Event = field(default_factory=threading.Event)
    is_closed: threading.Event = field(default_factory=threading.Event)
    open_calls: dict[int, OpenCall] = field(default_factory=dict)
    images: dict[str, bytes] = field(default_factory=dict)

    def opened(self, reader: str, replica: Replica, job_id: str, call: Any) -> OpenCall:
        """Note a stream that is open from now on."""
        opened = OpenCall(reader, replica.name, job_id, call)
        self.open_calls[id(opened)] = opened
        return opened

    def closed(self, opened: OpenCall) -> None:
        """Note that a stream has ended."""
        self.open_calls.pop(id(opened), None)

    def code(self, name: str, error: grpc.RpcError) -> grpc.StatusCode:
        """The code of an error, which is noted."""
        assert isinstance(error, grpc.Call)
        code: grpc.StatusCode = error.code()
        self.history.note_refusal(name, code.name)
        return code


def spec_of(image_request: ImageRequest) -> image_pb2.ImageSpec:
    return image_pb2.ImageSpec(
        prompt=image_request.prompt,
        width=image_request.side,
        height=image_request.side,
        num_inference_steps=image_request.num_inference_steps,
        seed=image_request.seed,
    )


def submitted(
    stage: Stage,
    replicas: Sequence[Replica],
    request_id: str,
    image_request: ImageRequest,
    *,
    is_alone: bool = False,
) -> str:
    """Submit until one of the replicas acknowledges it, each in turn; the job, or "" when all is over."""
    message = image_gen_pb2.SubmitJobRequest(spec=spec_of(image_request), request_id=request_id)
    number = 0
    while not stage.is_closed.is_set():
        replica = replicas[number % len(replicas)]
        number += 1
        try:
            job_id = replica.stub.SubmitJob(message, timeout=CALL_SECONDS).job_id
        except grpc.RpcError as error:
            stage.code("SubmitJob", error)
            stage.is_closed.wait(PAUSE_SECONDS)
            continue
        stage.history.note(Acknowledged(job_id, request_id, image_request, replica.name, is_alone=is_alone))
        return job_id
    return ""


class Watcher:
    """Follows one job over any number of streams, at any replicas, from the last sequence on.

    Args:
        choices: which replica, and how long until it reconnects for no reason.
        is_patient: never reconnects while its stream is open.
    """

    def __init__(
        self, stage: Stage, name: str, job_id: str, choices: random.Random, *, is_patient: bool
    ) -> None:
        self._stage = stage
        self._name = name
        self._job_id = job_id
        self._choices = choices
        self._is_patient = is_patient
        self._sequence = 0

    def run(self) -> None:
        """Read until the job has ended, or until nobody waits any more."""
        while not self._read_once():
            if self._stage.is_closed.wait(self._choices.uniform(0.0, PAUSE_SECONDS)):
                return
            self._stage.history.note_reconnect()

    def _read_once(self) -> bool:
        """Whether the job has ended, and nothing more is to come."""
        stage, replica = self._stage, self._choices.choice(self._stage.replicas)
        message = image_gen_pb2.WatchJobRequest(job_id=self._job_id, after_sequence=self._sequence)
        timeout = None if self._is_patient else self._choices.uniform(0.3, CALL_SECONDS)
        call = replica.stub.WatchJob(message, timeout=timeout)
        opened = stage.opened(self._name, replica, self._job_id, call)
        has_ended = False
        try:
            for response in call:
                note_event(stage, opened, self._job_id, response.event)
                self._sequence = response.event.sequence
                has_ended = has_ended or response.event.WhichOneof("event") in ENDS
        except grpc.RpcError as error:
            # A job that is not known is the checker's to judge.
            return stage.code("WatchJob", error) is grpc.StatusCode.NOT_FOUND or has_ended
        finally:
            stage.closed(opened)
        return has_ended


def note_event(stage: Stage, opened: OpenCall, job_id: str, event: job_pb2.JobEvent) -> None:
    opened.last_seconds = time.monotonic()
    kind = event.WhichOneof("event") or ""
    told = Told(opened.reader, opened.replica, job_id, event.sequence, kind, opened.last_seconds)
    stage.history.note(told)


class Dashboard:
    """Follows all jobs at one replica, and opens another stream when one ends."""

    def __init__(self, stage: Stage, replica: Replica) -> None:
        self._stage = stage
        self._replica = replica
        self.seen: dict[str, str] = {}

    def run(self) -> None:
        """Read until nobody waits any more."""
        while not self._stage.is_closed.is_set():
            call = self._replica.stub.WatchJobs(image_gen_pb2.WatchJobsRequest())
            opened = self._stage.opened(f"dashboard of {self._replica.name}", self._replica, "", call)
            try:
                for response in call:
                    self._note(opened, response.job)
            except grpc.RpcError as error:
                self._stage.code("WatchJobs", error)
            finally:
                self._stage.closed(opened)
            self._stage.history.note_reconnect()
            self._stage.is_closed.wait(PAUSE_SECONDS)

    def _note(self, opened: OpenCall, job: job_pb2.Job) -> None:
        opened.last_seconds = time.monotonic()
        state = job_pb2.JobState.Name(job.state).removeprefix("JOB_STATE_")
        if self.seen.get(job.job_id) != state:
            self.seen[job.job_id] = state
            told = ChangeTold(opened.reader, opened.replica, job.job_id, state, opened.last_seconds)
            self._stage.history.note(told)


class Caller:
    """One that does one thing after another, as its random numbers say.

    Args:
        start: runs a function in a thread that the run waits for.
    """

    def __init__(
        self, stage: Stage, name: str, seed: str, start: Callable[[str, Callable[[], None]], None]
    ) -> None:
        self._stage = stage
        self._name = name
        self._choices = random.Random(seed)
        self._start = start
        self._count = 0
        self._job_ids: list[str] = []

    def run(self) -> None:
        """Call until all is over."""
        actions = (
            self.draw,
            self.draw_in_time,
            self.leave,
            self.detach,
            self.submit_and_watch,
            self.submit_and_watch,
            self.submit_twice,
            self.cancel,
            self.download,
        )
        while not self._stage.is_over.is_set():
            is_done = threading.Event()
            self._start(f"{self._name} at work", partial(self._act, self._choices.choice(actions), is_done))
            # A stream that hangs keeps a thread, and not the caller.
            is_done.wait(ACTION_SECONDS)

    def _act(self, action: Callable[[], None], is_done: threading.Event) -> None:
        try:
            action()
        finally:
            is_done.set()

    def draw(self) -> None:
        """Stay with a request, over any number of calls with its request id."""
        request_id, image_request = self._request_id(), self._choices.choice(IMAGE_REQUESTS)
        while not self._stage.is_closed.is_set():
            if self._generate(request_id, image_request, num_events=None):
                return
            self._stage.history.note_reconnect()
            self._stage.is_closed.wait(PAUSE_SECONDS)

    def draw_in_time(self) -> None:
        """Draw with a deadline that may be too short."""
        image_request, timeout = self._choices.choice(IMAGE_REQUESTS), self._choices.uniform(0.3, 4.0)
        self._generate(self._request_id(), image_request, num_events=None, timeout=timeout)

    def leave(self) -> None:
        """Leave a request in the middle."""
        image_request = self._choices.choice(IMAGE_REQUESTS)
        self._generate(self._request_id(), image_request, num_events=self._choices.randint(1, 6))

    def detach(self) -> None:
        """Leave a request that goes on, and watch it elsewhere."""
        image_request = self._choices.choice(IMAGE_REQUESTS)
        self._generate(
            self._request_id(), image_request, num_events=self._choices.randint(1, 4), detached=True
        )
        if self._job_ids:
            self._watch(self._job_ids[-1])

    def submit_and_watch(self) -> None:
        """Follow a job, with two readers as often as not."""
        if job_id := self._submit():
            if self._choices.random() < 0.5:
                self._watch_aside(job_id)
            self._watch(job_id)

    def submit_twice(self) -> None:
        """Submit at one replica, and again at another."""
        request_id, image_request = self._request_id(), self._choices.choice(IMAGE_REQUESTS)
        order = self._order()
        for replicas in (order, order[::-1]):
            if job_id := submitted(self._stage, replicas, request_id, image_request):
                self._job_ids.append(job_id)
                self._watch_aside(job_id)

    def cancel(self) -> None:
        """Cancel a job somewhere while it waits, runs, or has ended."""
        if not (job_id := self._submit()):
            return
        self._watch_aside(job_id)
        self._stage.is_closed.wait(self._choices.uniform(0.0, 0.5))
        message = image_gen_pb2.CancelJobRequest(job_id=job_id)
        while not self._stage.is_closed.is_set():
            try:
                job = self._choices.choice(self._stage.replicas).stub.CancelJob(message, timeout=CALL_SECONDS)
            except grpc.RpcError as error:
                if self._stage.code("CancelJob", error) is grpc.StatusCode.NOT_FOUND:
                    return
                # It may have been asked for, and may not.
                self._stage.history.note(Cancelled(job_id, ""))
                self._stage.is_closed.wait(PAUSE_SECONDS)
                continue
            state = job_pb2.JobState.Name(job.state).removeprefix("JOB_STATE_")
            self._stage.history.note(Cancelled(job_id, state))
            break
        self._watch(job_id)

    def download(self) -> None:
        """Read the image of a job that this caller had drawn."""
        if not self._job_ids:
            return
        job_id, replica = self._choices.choice(self._job_ids), self._choices.choice(self._stage.replicas)
        image = read_image(self._stage, replica, job_id)
        if image is not None and not image.problem:
            self._stage.history.note(Downloaded(job_id, replica.name, image))

    def _request_id(self) -> str:
        self._count += 1
        return f"{self._name}-{self._count}"

    def _order(self) -> list[Replica]:
        return self._choices.sample(self._stage.replicas, len(self._stage.replicas))

    def _submit(self) -> str:
        image_request = self._choices.choice(IMAGE_REQUESTS)
        job_id = submitted(self._stage, self._order(), self._request_id(), image_request)
        if job_id:
            self._job_ids.append(job_id)
        return job_id

    def _watch(self, job_id: str) -> None:
        choices = random.Random(self._choices.random())
        name = f"{self._name}, watching {job_id[:6]} {self._count}"
        Watcher(self._stage, name, job_id, choices, is_patient=False).run()

    def _watch_aside(self, job_id: str) -> None:
        self._count += 1
        choices = random.Random(self._choices.random())
        name = f"{self._name}, aside {job_id[:6]} {self._count}"
        self._start(name, Watcher(self._stage, name, job_id, choices, is_patient=True).run)

    def _generate(
        self,
        request_id: str,
        image_request: ImageRequest,
        num_events: int | None,
        *,
        detached: bool = False,
        timeout: float | None = None,
    ) -> bool:
        """Read a request to its end, or so many events of it; whether the caller is done with it."""
        stage, replica = self._stage, self._choices.choice(self._stage.replicas)
        message = image_gen_pb2.GenerateRequest(
            spec=spec_of(image_request), request_id=request_id, detached=detached
        )
        call = replica.stub.Generate(message, timeout=timeout)
        job_id, opened = "", stage.opened(f"{self._name}, {request_id} {self._count}", replica, "", call)
        self._count += 1
        try:
            for count, response in enumerate(call, start=1):
                if not job_id:
                    opened.job_id = job_id = response.job_id
                    has_deadline = timeout is not None
                    stage.history.note(
                        Acknowledged(
                            job_id, request_id, image_request, replica.name, has_deadline=has_deadline
                        )
                    )
                    self._job_ids.append(job_id)
                note_event(stage, opened, job_id, response.event)
                if count == num_events:
                    break
            else:
                return True
        except grpc.RpcError as error:
            code = stage.code("Generate", error)
            if job_id and not detached:
                # The server may have seen a caller leave.
                stage.history.note(Cancelled(job_id, ""))
            return code in (grpc.StatusCode.INTERNAL, grpc.StatusCode.CANCELLED) or num_events is not None
        finally:
            stage.closed(opened)
        if not detached:
            stage.history.note(Cancelled(job_id, ""))
        call.cancel()
        return True


def read_image(stage: Stage, replica: Replica, job_id: str, index: int = 0) -> FinalImage | None:
    """Download one image; None when the job has none, or when a replica does not answer for it."""
    try:
        job = replica.stub.GetJob(image_gen_pb2.GetJobRequest(job_id=job_id), timeout=CALL_SECONDS)
    except grpc.RpcError as error:
        stage.code("GetJob", error)
        return None
    if job.state != job_pb2.JOB_STATE_SUCCEEDED or index >= len(job.images):
        return None
    return downloaded(stage, replica, job_id, job.images[index])


def downloaded(stage: Stage, replica: Replica, job_id: str, info: image_pb2.ImageInfo) -> FinalImage:
    """An image as it is told of and as it is read; the file is kept."""
    message = image_gen_pb2.DownloadImageRequest(job_id=job_id, image_index=info.index)
    data, problem = b"", ""
    try:
        for response in replica.stub.DownloadImage(message, timeout=CALL_SECONDS):
            data += response.chunk.data
    except grpc.RpcError as error:
        problem = stage.code("DownloadImage", error).name
    sha256 = hashlib.sha256(data).hexdigest()
    if not problem:
        stage.images[sha256] = data
    return FinalImage(info.index, info.size_bytes, info.sha256.hex(), len(data), sha256, problem)
