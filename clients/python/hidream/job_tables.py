"""Jobs as text for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import code_pb2

from hidream.job_ids import short_ids
from hidream.terminal import format_seconds, table
from hidream.v1 import job_pb2

_PROMPT_CHARACTERS = 48
_COLUMNS = "{:<8}  {:<9}  {:>9}  {:<19}  {}"


def state_name(job: job_pb2.Job) -> str:
    """Return the state of a job, such as `RUNNING`."""
    return job_pb2.JobState.Name(job.state).removeprefix("JOB_STATE_")


def job_table(job: job_pb2.Job) -> str:
    """Return one job, one fact a line."""
    return table(_job_rows(job))


def jobs_table(jobs: Sequence[job_pb2.Job], has_header: bool) -> Iterator[str]:
    """Yield one line a job, with the beginning of its id, below the names of the columns where wanted."""
    if has_header:
        yield _COLUMNS.format("job", "state", "step", "accepted (UTC)", "prompt")
    for job, short_id in zip(jobs, short_ids([job.job_id for job in jobs]), strict=True):
        steps = f"{job.progress.step}/{job.spec.num_inference_steps}"
        prompt = " ".join(job.spec.prompt.split())
        if len(prompt) > _PROMPT_CHARACTERS:
            prompt = prompt[: _PROMPT_CHARACTERS - 1] + "…"
        yield _COLUMNS.format(short_id, state_name(job), steps, _time(job.create_time), prompt)


def _job_rows(job: job_pb2.Job) -> Iterator[tuple[str, str]]:
    spec, timings = job.spec, job.timings
    yield "job", job.job_id
    yield "request", job.request_id
    yield "state", state_name(job)
    yield "stage", _name(job_pb2.JobStage.Name(job.stage), "JOB_STAGE_")
    yield "error", f"{code_pb2.Code.Name(job.error.code)}: {job.error.message}" if job.error.code else ""
    wait = f", about {format_seconds(_seconds(job.estimated_wait))} to wait"
    yield (
        "queue",
        f"position {job.queue_position}{wait if job.HasField('estimated_wait') else ''}"
        if job.queue_position
        else "",
    )
    yield "progress", _progress(job.progress) if job.HasField("progress") else ""
    yield "prompt", " ".join(spec.prompt.split())
    yield "negative", " ".join(spec.negative_prompt.split())
    yield (
        "images",
        f"{spec.width}×{spec.height}, {spec.num_inference_steps} steps, guidance {spec.guidance_scale:g}, "
        f"seed {spec.seed}, {spec.num_images} image{'s' if spec.num_images > 1 else ''}",
    )
    yield "model", job.model or job.execution.model
    yield "priority", _name(job_pb2.Priority.Name(job.priority), "PRIORITY_")
    yield "labels", ", ".join(f"{key}={value}" for key, value in sorted(job.labels.items()))
    yield "accepted", f"{_time(job.create_time)} UTC"
    yield "started", f"{_time(job.start_time)} UTC" if job.HasField("start_time") else ""
    yield "ended", f"{_time(job.end_time)} UTC" if job.HasField("end_time") else ""
    yield (
        "time",
        ", ".join(
            f"{field.name} {format_seconds(_seconds(duration))}" for field, duration in timings.ListFields()
        ),
    )
    for image in job.images:
        yield (
            f"image {image.index}",
            f"seed {image.seed}, {image.mime_type}, {image.size_bytes:,} bytes, SHA-256 {image.sha256.hex()}",
        )


def _progress(progress: job_pb2.JobProgress) -> str:
    text = f"step {progress.step} of {progress.total_steps}, "
    text += f"{format_seconds(_seconds(progress.step_duration))} a step"
    if remaining_seconds := _seconds(progress.estimated_remaining):
        text += f", {format_seconds(remaining_seconds)} left"
    return text


def _name(name: str, prefix: str) -> str:
    short = name.removeprefix(prefix)
    return "" if short == "UNSPECIFIED" else short


def _time(timestamp: Timestamp) -> str:
    return f"{timestamp.ToDatetime():%Y-%m-%d %H:%M:%S}"


def _seconds(duration: Duration) -> float:
    return duration.ToTimedelta().total_seconds()
