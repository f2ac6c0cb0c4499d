from __future__ import annotations

import dataclasses

import pytest
from google.rpc import code_pb2
from hypothesis import given
from hypothesis import strategies as st

from hidream.v1 import image_gen_pb2, image_pb2, job_pb2
from hidream_grpc.engine.requests import Priority
from hidream_grpc.errors import DeadlineExceededError, OutOfDeviceMemoryError
from hidream_grpc.jobs.job import (
    CancelReason,
    Execution,
    Job,
    JobState,
    ModelIdentity,
    Progress,
    StoredImage,
    Submission,
)
from hidream_grpc.jobs.limits import RequestDefaults
from hidream_grpc.jobs.watching import events
from hidream_grpc.model.checkpoint.tokenizers.prompt_tokens import TokenCount
from hidream_grpc.model.parameters import GenerationParameters, OutputFormat
from hidream_grpc.server import convert
from hidream_grpc.server.checks.generation import RequestValidator
from tests.unit.server.checks.test_generation import LIMITS

PARAMETERS = GenerationParameters(
    prompt="a red circle",
    negative_prompt="blue",
    width=64,
    height=128,
    num_inference_steps=9,
    guidance_scale=2.5,
    num_images=2,
    seed=17,
    output_format=OutputFormat.JPEG,
    quality=80,
)
EXECUTION = Execution("demo", "UniPCMultistepScheduler", 3.0, "tp=4,ep=2", attempt=2)
IMAGE = StoredImage(1, 64, 128, 18, "image/jpeg", 1234, bytes(range(32)))
PROGRESS = Progress(step=4, total_steps=9, step_seconds=0.25, estimated_remaining_seconds=1.5)


def event(body: events.Body, image_data: bytes = b"") -> job_pb2.JobEvent:
    return convert.job_event(events.JobEvent(sequence=12, time=1_700_000_000.25, body=body), image_data)


@given(
    st.builds(
        GenerationParameters,
        prompt=st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20).filter(
            str.strip
        ),
        width=st.sampled_from([64, 128]),
        height=st.sampled_from([64, 256]),
        num_inference_steps=st.integers(1, LIMITS.max_num_inference_steps),
        guidance_scale=st.floats(0, 7, width=32),
        num_images=st.integers(1, LIMITS.max_num_images),
        seed=st.integers(0, LIMITS.max_seed),
        output_format=st.sampled_from([OutputFormat.JPEG, OutputFormat.WEBP]),
        quality=st.integers(1, 100),
    )
)
def test_the_spec_that_a_job_reports_asks_for_the_same_job_again(parameters: GenerationParameters) -> None:
    other_defaults = RequestDefaults(512, 512, 1, 1.0, 1, 1)
    validator = RequestValidator(LIMITS, other_defaults, lambda prompt: (TokenCount("T5", 3),))
    spec = image_pb2.ImageSpec.FromString(convert.image_spec(parameters).SerializeToString())
    again = validator.submission(image_gen_pb2.GenerateRequest(spec=spec), "me", None)
    assert again.parameters == parameters


def test_the_spec_of_a_png_has_no_quality_and_is_accepted_again() -> None:
    spec = convert.image_spec(
        GenerationParameters(
            prompt="a", width=64, height=64, num_inference_steps=1, guidance_scale=0.0, seed=0
        )
    )
    present = {field.name for field, _ in spec.ListFields()}
    optional = {field.name for field in spec.DESCRIPTOR.fields if field.has_presence}
    assert optional - present == {"quality"}


@given(st.floats(0, 1e9))
def test_durations_and_times_keep_their_value(seconds: float) -> None:
    assert convert.duration(seconds).ToNanoseconds() == pytest.approx(seconds * 1e9, abs=1000)
    assert convert.timestamp(seconds).ToMicroseconds() == pytest.approx(seconds * 1e6, abs=1)


def test_a_job_tells_everything_that_is_known_of_it() -> None:
    job = Job(
        "j1", Submission(PARAMETERS, "r1", "me", Priority.HIGH, {"team": "a"}), create_time=1_700_000_000.0
    )
    waiting = convert.job(job)
    assert (waiting.job_id, waiting.request_id) == ("j1", "r1")
    assert (waiting.state, waiting.stage) == (job_pb2.JOB_STATE_QUEUED, job_pb2.JOB_STAGE_UNSPECIFIED)
    assert (waiting.priority, dict(waiting.labels)) == (job_pb2.PRIORITY_HIGH, {"team": "a"})
    absent = ("execution", "progress", "error", "start_time", "end_time")
    assert not any(waiting.HasField(name) for name in absent)  # type: ignore[arg-type]
    assert waiting.model == "", "a row of before there were several models"
    submission = dataclasses.replace(job.submission, model=ModelIdentity("demo", "dev", "0123456789abcdef"))
    assert convert.job(dataclasses.replace(job, submission=submission)).model == "demo"

    job = job.started(EXECUTION, 1_700_000_002.0).encoded(0.5).progressed(PROGRESS, 1.25)
    running = convert.job(job.with_image(IMAGE, 0.75))
    assert (running.state, running.stage) == (job_pb2.JOB_STATE_RUNNING, job_pb2.JOB_STAGE_DENOISING)
    assert (running.execution.layout, running.execution.attempt) == ("tp=4,ep=2", 2)
    assert running.progress.step == 4
    assert running.progress.estimated_remaining.ToTimedelta().total_seconds() == 1.5
    timings = running.timings
    assert [
        part.ToTimedelta().total_seconds()
        for part in (timings.queue, timings.encode, timings.denoise, timings.decode)
    ] == [2.0, 0.5, 1.25, 0.75]
    assert [image.sha256 for image in running.images] == [IMAGE.sha256]

    ended = convert.job(job.ended(JobState.FAILED, 1_700_000_009.0, OutOfDeviceMemoryError("j1")))
    assert (ended.state, ended.error.code) == (job_pb2.JOB_STATE_FAILED, code_pb2.RESOURCE_EXHAUSTED)
    assert ended.end_time.ToSeconds() == 1_700_000_009
    assert ended.timings.total.ToTimedelta().total_seconds() == 9.0


def test_every_state_and_reason_of_a_job_has_its_name_in_the_contract() -> None:
    for state in (JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED):
        job = Job("j1", Submission(PARAMETERS, "r1", "me"), create_time=0.0).ended(state, 1.0)
        assert job_pb2.JobState.Name(convert.job(job).state) == f"JOB_STATE_{state}"
    for reason in CancelReason:
        told = event(events.Cancelled(reason, DeadlineExceededError("j1"))).cancelled.reason
        assert job_pb2.CancelReason.Name(told) == f"CANCEL_REASON_{reason.value}"


def test_an_image_chunk_carries_its_bytes_and_what_they_are_a_piece_of() -> None:
    chunk = event(events.ImagePart(IMAGE, 1000, 234), b"x" * 234).image_chunk
    assert (chunk.offset, chunk.data) == (1000, b"x" * 234)
    for field in image_pb2.ImageInfo.DESCRIPTOR.fields_by_name:
        assert getattr(chunk.image, field) == getattr(IMAGE, field)


JOB = Job("j1", Submission(PARAMETERS, "r1", "me"), create_time=0.0)
EVENTS: dict[str, events.Body] = {
    "queued": events.Queued(3),
    "started": events.Started(PARAMETERS, EXECUTION, 2.0),
    "progress": events.Progressed(PROGRESS),
    "preview": events.Previewed(4, b"jpeg"),
    "restarted": events.Restarted(2, "rank 1: killed by SIGKILL", 0),
    "image_chunk": events.ImagePart(IMAGE, 0, 1),
    "succeeded": events.Succeeded(JOB),
    "failed": events.Failed(OutOfDeviceMemoryError("j1")),
    "cancelled": events.Cancelled(CancelReason.DEADLINE, DeadlineExceededError("j1")),
}


@pytest.mark.parametrize(("kind", "body"), EVENTS.items(), ids=list(EVENTS))
def test_each_event_is_told_in_its_own_field_with_its_number_and_time(kind: str, body: events.Body) -> None:
    message = event(body)
    assert message.WhichOneof("event") == kind
    assert (message.sequence, message.time.ToMilliseconds()) == (12, 1_700_000_000_250)
    assert getattr(message, kind).ByteSize() > 0


def test_there_is_an_event_of_every_kind_here() -> None:
    assert set(EVENTS) == {field.name for field in job_pb2.JobEvent.DESCRIPTOR.oneofs_by_name["event"].fields}


def test_estimates_are_absent_while_the_server_cannot_tell() -> None:
    progress = convert.progress(dataclasses.replace(PROGRESS, estimated_remaining_seconds=None))
    assert not progress.HasField("estimated_remaining")
    assert not event(events.Queued(3)).queued.HasField("estimated_wait")
    assert not convert.job(JOB, events.Queued(3)).HasField("estimated_wait")


def test_a_waiting_job_tells_its_place_and_how_long_it_waits() -> None:
    position = events.Queued(3, 1.5)
    for message in (event(position).queued, convert.job(JOB, position)):
        assert message.queue_position == 3
        assert message.estimated_wait.ToMilliseconds() == 1500
    assert convert.job(JOB).queue_position == 0


def test_a_job_tells_when_its_images_will_be_there_until_they_are() -> None:
    queued = dataclasses.replace(JOB, state=JobState.QUEUED)
    message = convert.job(queued, events.Queued(3, 1.5, 4.5))
    assert message.estimated_remaining.ToMilliseconds() == 4500
    running = dataclasses.replace(JOB, state=JobState.RUNNING, progress=PROGRESS)
    assert convert.job(running).estimated_remaining == convert.progress(PROGRESS).estimated_remaining
    ended = dataclasses.replace(running, state=JobState.SUCCEEDED)
    assert not convert.job(ended).HasField("estimated_remaining")
