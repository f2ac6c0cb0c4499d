"""Requests for small pictures, and what came of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from hidream.v1 import image_gen_pb2, image_pb2, job_pb2


def request(
    prompt: str = "a red circle on a blue background",
    *,
    preview: bool = False,
    detached: bool = False,
    request_id: str = "",
    priority: job_pb2.Priority.ValueType = job_pb2.PRIORITY_UNSPECIFIED,
    **spec: Any,
) -> image_gen_pb2.GenerateRequest:
    """A request for a picture of 128×128 from seed 0, unless spec says otherwise."""
    fields = {"width": 128, "height": 128, "seed": 0, **spec}
    return image_gen_pb2.GenerateRequest(
        spec=image_pb2.ImageSpec(prompt=prompt, **fields),
        preview=preview,
        detached=detached,
        request_id=request_id,
        priority=priority,
    )


@dataclass(frozen=True)
class Stream:
    """A stream that was read to its end."""

    responses: list[image_gen_pb2.GenerateResponse]

    @property
    def events(self) -> list[job_pb2.JobEvent]:
        return [response.event for response in self.responses]

    @property
    def kinds(self) -> list[str]:
        return [event.WhichOneof("event") or "" for event in self.events]

    def of_kind(self, kind: str) -> list[job_pb2.JobEvent]:
        return [event for event in self.events if event.HasField(kind)]  # type: ignore[arg-type]

    @property
    def steps(self) -> list[int]:
        """The steps that were told, in order; a busy reader may miss some, since the newest is kept."""
        return [event.progress.step for event in self.of_kind("progress")]

    @property
    def job(self) -> job_pb2.Job:
        """The job as its last event gives it."""
        return self.events[-1].succeeded.job

    @property
    def images(self) -> list[bytes]:
        """The images, put together from their chunks; every chunk must follow the one before."""
        files: dict[int, bytes] = {}
        for event in self.of_kind("image_chunk"):
            chunk = event.image_chunk
            data = files.get(chunk.image.index, b"")
            assert chunk.offset == len(data)
            files[chunk.image.index] = data + chunk.data
        return [files[index] for index in sorted(files)]


def follow(call: Iterator[image_gen_pb2.GenerateResponse]) -> Stream:
    """Read a stream to its end."""
    return Stream(list(call))


def read_until(
    call: Iterator[image_gen_pb2.GenerateResponse], condition: Callable[[job_pb2.JobEvent], bool]
) -> list[image_gen_pb2.GenerateResponse]:
    """Read a stream up to the first event that fulfils the condition; it must come."""
    responses = []
    for response in call:
        responses.append(response)
        if condition(response.event):
            return responses
    raise AssertionError(f"the stream ended after {Stream(responses).kinds} without the event")


def grow_to(steps: list[int], last: int) -> bool:
    """Whether steps only grow, and end with the last one."""
    return steps == sorted(set(steps)) and steps[-1:] == [last]


def is_progress(event: job_pb2.JobEvent) -> bool:
    return event.HasField("progress")
