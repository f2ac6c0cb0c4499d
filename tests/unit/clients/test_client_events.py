import hashlib
from datetime import UTC, datetime
from typing import Any

import pytest
from google.protobuf import duration_pb2, timestamp_pb2
from google.rpc import code_pb2, status_pb2

from hidream import events
from hidream.errors import BrokenImageError, CancelledError, InternalError, StreamError
from hidream.events import EventReader
from hidream.images import Image
from hidream.v1 import image_pb2, job_pb2
from hidream.watching import JobChange

FILE = b"the bytes of one file"
INFO = image_pb2.ImageInfo(size_bytes=len(FILE), sha256=hashlib.sha256(FILE).digest())
TIME = timestamp_pb2.Timestamp(seconds=1_700_000_000)
COMMON: dict[str, Any] = {
    "job_id": "job-1",
    "sequence": 4,
    "time": datetime.fromtimestamp(1_700_000_000, UTC),
}


def seconds(value: float) -> duration_pb2.Duration:
    return duration_pb2.Duration(seconds=int(value), nanos=round(value % 1 * 1e9))


def image_chunk(start: int, end: int) -> job_pb2.JobEvent:
    piece = image_pb2.ImageChunk(image=INFO, offset=start, data=FILE[start:end])
    return job_pb2.JobEvent(image_chunk=piece)


@pytest.mark.parametrize(
    ("message", "event"),
    [
        pytest.param(
            job_pb2.JobEvent(queued=job_pb2.Queued(queue_position=2, estimated_wait=seconds(1.5))),
            events.Queued(queue_position=2, estimated_wait_seconds=1.5, **COMMON),
            id="queued",
        ),
        pytest.param(
            job_pb2.JobEvent(queued=job_pb2.Queued(queue_position=1)),
            events.Queued(queue_position=1, estimated_wait_seconds=None, **COMMON),
            id="queued without an estimate",
        ),
        pytest.param(
            job_pb2.JobEvent(
                started=job_pb2.Started(
                    spec=image_pb2.ImageSpec(seed=9),
                    execution=job_pb2.Execution(attempt=1),
                    queue_duration=seconds(0.25),
                )
            ),
            events.Started(
                spec=image_pb2.ImageSpec(seed=9),
                execution=job_pb2.Execution(attempt=1),
                queue_seconds=0.25,
                **COMMON,
            ),
            id="started",
        ),
        pytest.param(
            job_pb2.JobEvent(
                progress=job_pb2.JobProgress(
                    step=3, total_steps=8, step_duration=seconds(0.5), estimated_remaining=seconds(2.5)
                )
            ),
            events.Progress(
                step=3, total_steps=8, step_seconds=0.5, estimated_remaining_seconds=2.5, **COMMON
            ),
            id="progress",
        ),
        pytest.param(
            job_pb2.JobEvent(preview=job_pb2.Preview(step=3, mime_type="image/jpeg", data=b"small")),
            events.Preview(step=3, mime_type="image/jpeg", data=b"small", **COMMON),
            id="preview",
        ),
        pytest.param(
            job_pb2.JobEvent(restarted=job_pb2.Restarted(attempt=2, reason="rank 1", resumed_from_step=5)),
            events.Restarted(attempt=2, reason="rank 1", resumed_from_step=5, **COMMON),
            id="restarted",
        ),
        pytest.param(job_pb2.JobEvent(), None, id="a kind that a newer server knows"),
    ],
)
def test_each_message_becomes_its_event(message: job_pb2.JobEvent, event: events.Event | None) -> None:
    message.sequence = 4
    message.time.CopyFrom(TIME)
    assert EventReader().read("job-1", message) == event


def test_an_image_is_one_event_once_all_its_pieces_are_there() -> None:
    reader = EventReader()
    assert reader.read("job-1", image_chunk(0, 5)) is None
    event = reader.read("job-1", image_chunk(5, len(FILE)))
    assert isinstance(event, events.ImageFinished)
    assert event.image.data == FILE


def test_success_comes_with_measured_times_and_ends_the_stream_well() -> None:
    reader = EventReader()
    reader.read("job-1", image_chunk(0, len(FILE)))
    timings = job_pb2.JobTimings(
        queue=seconds(0.1), encode=seconds(0.2), denoise=seconds(3), decode=seconds(0.4), total=seconds(3.7)
    )
    job = job_pb2.Job(images=[INFO], timings=timings)
    event = reader.read("job-1", job_pb2.JobEvent(succeeded=job_pb2.Succeeded(job=job)))
    assert isinstance(event, events.Succeeded)
    assert event.timings == events.Timings(
        queue_seconds=0.1, encode_seconds=0.2, denoise_seconds=3.0, decode_seconds=0.4, total_seconds=3.7
    )
    reader.finish()


def test_success_without_every_image_is_refused() -> None:
    reader = EventReader()
    reader.read("job-1", image_chunk(0, 5))
    succeeded = job_pb2.Succeeded(job=job_pb2.Job(images=[INFO]))
    with pytest.raises(BrokenImageError, match="image 0: the stream ended before the image did"):
        reader.read("job-1", job_pb2.JobEvent(succeeded=succeeded))


def test_success_with_another_image_than_arrived_is_refused() -> None:
    reader = EventReader()
    reader.read("job-1", image_chunk(0, len(FILE)))
    other = image_pb2.ImageInfo(size_bytes=len(FILE), sha256=b"another")
    succeeded = job_pb2.Succeeded(job=job_pb2.Job(images=[other]))
    with pytest.raises(BrokenImageError, match="image 0: it is not the one that the job ended with"):
        reader.read("job-1", job_pb2.JobEvent(succeeded=succeeded))


def test_success_with_fewer_images_than_arrived_is_refused() -> None:
    reader = EventReader()
    reader.read("job-1", image_chunk(0, len(FILE)))
    with pytest.raises(StreamError, match="1 images have arrived of a job that drew 0"):
        reader.read("job-1", job_pb2.JobEvent(succeeded=job_pb2.Succeeded(job=job_pb2.Job())))


def test_a_stream_that_ends_in_the_middle_of_an_image_says_so() -> None:
    reader = EventReader()
    reader.read("job-1", image_chunk(0, 5))
    with pytest.raises(BrokenImageError) as broken:
        reader.finish()
    assert broken.value.image_index == 0


def test_a_stream_that_ends_before_its_job_is_refused() -> None:
    reader = EventReader()
    reader.read("job-1", image_chunk(0, len(FILE)))
    with pytest.raises(StreamError, match="before the job"):
        reader.finish()


def test_a_failed_job_raises_its_error() -> None:
    status = status_pb2.Status(code=code_pb2.INTERNAL, message="internal error a1b2")
    with pytest.raises(InternalError, match="a1b2"):
        EventReader().read("job-1", job_pb2.JobEvent(failed=job_pb2.Failed(status=status)))


def test_a_cancelled_job_raises_who_stopped_it() -> None:
    cancelled = job_pb2.Cancelled(reason=job_pb2.CANCEL_REASON_REQUESTED)
    with pytest.raises(CancelledError, match="CANCEL_REASON_REQUESTED"):
        EventReader().read("job-1", job_pb2.JobEvent(cancelled=cancelled))


def test_events_cannot_be_changed() -> None:
    event = EventReader().read("job-1", job_pb2.JobEvent(queued=job_pb2.Queued(queue_position=1)))
    with pytest.raises(AttributeError):
        event.queue_position = 2  # type: ignore[union-attr, misc]


def test_events_are_short_lines_however_much_they_carry() -> None:
    spec, job = (
        image_pb2.ImageSpec(prompt="a" * 9999),
        job_pb2.Job(spec=image_pb2.ImageSpec(prompt="a" * 9999)),
    )
    image = Image(
        index=0, width=64, height=64, seed=7, mime_type="image/png", sha256=b"7" * 32, data=FILE * 999
    )
    timings = dict.fromkeys(events.Timings.__annotations__, 0.5)
    for event in (
        events.Started(spec=spec, execution=job_pb2.Execution(model="a" * 9999), queue_seconds=0, **COMMON),
        events.Preview(step=3, mime_type="image/jpeg", data=FILE * 999, **COMMON),
        events.ImageFinished(image=image, **COMMON),
        events.Succeeded(job=job, timings=events.Timings(**timings), **COMMON),
        JobChange(job, datetime.fromtimestamp(0, UTC)),
    ):
        text = repr(event)
        assert len(text) < 320 and "\n" not in text
        assert type(event).__name__ in text
