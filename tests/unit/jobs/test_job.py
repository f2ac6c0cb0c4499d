from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from hidream_grpc.errors import JobInternalError
from hidream_grpc.jobs.job import Execution, Job, JobStage, JobState, Progress, StoredImage, Submission
from hidream_grpc.model.parameters import GenerationParameters

PARAMETERS = GenerationParameters(
    prompt="a red circle", width=64, height=64, num_inference_steps=2, guidance_scale=5.0, seed=0
)
EXECUTION = Execution("demo", "UniPCMultistepScheduler", 3.0, "tp=4,ep=2")
ENDS = (JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED)

QUEUED = Job("j", Submission(PARAMETERS, "r", "caller"), create_time=100.0)
RUNNING = QUEUED.started(EXECUTION, now=103.0)


def image(index: int) -> StoredImage:
    return StoredImage(index, 64, 64, index, "image/png", 10, bytes(32))


CHANGES_OF_A_RUNNING_JOB: dict[str, Callable[[Job], Job]] = {
    "encoded": lambda job: job.encoded(0.1),
    "progressed": lambda job: job.progressed(Progress(1, 2, 0.1, None), 0.1),
    "restarted": lambda job: job.restarted(2, 0),
    "with_image": lambda job: job.with_image(image(0), 0.1),
}


def test_a_new_job_waits() -> None:
    assert (QUEUED.state, QUEUED.stage, QUEUED.state.has_ended) == (JobState.QUEUED, None, False)


def test_a_job_goes_through_its_stages_and_tells_the_time_of_each() -> None:
    job = RUNNING
    assert (job.state, job.stage, job.timings.queue_seconds) == (JobState.RUNNING, JobStage.ENCODING, 3.0)
    job = job.encoded(0.5)
    assert (job.stage, job.timings.encode_seconds) == (JobStage.DENOISING, 0.5)
    job = job.progressed(Progress(1, 2, 0.4, None), 0.4)
    assert (job.stage, job.timings.denoise_seconds) == (JobStage.DENOISING, 0.4)
    job = job.progressed(Progress(2, 2, 0.4, 0.0), 0.9)
    assert (job.stage, job.timings.denoise_seconds) == (JobStage.DECODING, 0.9)
    job = job.with_image(image(1), 0.2).with_image(image(0), 0.3)
    assert [i.index for i in job.images] == [0, 1]
    assert job.timings.decode_seconds == pytest.approx(0.5)
    job = job.ended(JobState.SUCCEEDED, now=110.0)
    assert (job.state, job.stage, job.end_time) == (JobState.SUCCEEDED, None, 110.0)
    assert (job.timings.queue_seconds, job.timings.total_seconds) == (3.0, 10.0)


@pytest.mark.parametrize("change", CHANGES_OF_A_RUNNING_JOB.values(), ids=list(CHANGES_OF_A_RUNNING_JOB))
def test_only_a_running_job_makes_progress(change: Callable[[Job], Job]) -> None:
    assert change(RUNNING).state is JobState.RUNNING
    for job in (QUEUED, *(RUNNING.ended(state, 110.0) for state in ENDS)):
        with pytest.raises(ValueError, match="job j is"):
            change(job)


def test_a_job_starts_once() -> None:
    for job in (RUNNING, *(QUEUED.ended(state, 110.0) for state in ENDS)):
        with pytest.raises(ValueError, match="not QUEUED"):
            job.started(EXECUTION, 111.0)


@pytest.mark.parametrize("end", ENDS)
def test_a_job_that_has_ended_never_changes_its_state(end: JobState) -> None:
    ended = RUNNING.ended(end, 110.0)
    assert ended.state.has_ended
    for other in ENDS:
        with pytest.raises(ValueError, match=f"job j is {end}"):
            ended.ended(other, 111.0)


def test_a_job_that_ends_in_the_queue_has_waited_all_its_time() -> None:
    error = JobInternalError.new()
    job = QUEUED.ended(JobState.FAILED, now=107.0, error=error)
    assert (job.timings.queue_seconds, job.timings.total_seconds) == (7.0, 7.0)
    assert (job.start_time, job.error) == (None, error)


def test_another_attempt_forgets_the_progress_and_keeps_the_images() -> None:
    job = RUNNING.encoded(0.5).progressed(Progress(2, 2, 0.4, 0.0), 0.9).with_image(image(0), 0.2)
    again = job.restarted(2, resumed_from_step=0)
    assert (again.stage, again.progress) == (JobStage.ENCODING, None)
    assert again.execution == dataclasses.replace(EXECUTION, attempt=2)
    assert again.images == job.images


def test_another_attempt_that_goes_on_after_a_step_has_the_progress_of_that_step() -> None:
    job = RUNNING.encoded(0.5).progressed(Progress(7, 9, 0.4, 0.8), 2.9)
    again = job.restarted(2, resumed_from_step=6)
    assert (again.stage, again.progress) == (JobStage.ENCODING, Progress(6, 9, 0.4, None))
    assert again.encoded(0.1).stage is JobStage.DENOISING


def test_another_attempt_of_a_job_that_was_denoised_goes_on_decoding() -> None:
    job = RUNNING.encoded(0.5).progressed(Progress(2, 2, 0.4, 0.0), 0.9)
    assert job.restarted(2, resumed_from_step=2).encoded(0.1).stage is JobStage.DECODING
