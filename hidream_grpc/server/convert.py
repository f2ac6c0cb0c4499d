"""Makes messages of the contract from the domain's values; no other module builds them."""

from __future__ import annotations

from google.protobuf import duration_pb2, timestamp_pb2

from hidream.v1 import image_pb2, job_pb2
from hidream_grpc.jobs.job import Execution, Job, JobState, Progress, StoredImage, Timings
from hidream_grpc.jobs.watching import events
from hidream_grpc.model.parameters import GenerationParameters
from hidream_grpc.server.status import to_status


def duration(seconds: float) -> duration_pb2.Duration:
    """Seconds as a protobuf duration."""
    message = duration_pb2.Duration()
    message.FromNanoseconds(int(seconds * 1e9))
    return message


def timestamp(epoch_seconds: float) -> timestamp_pb2.Timestamp:
    """Seconds since the epoch as a protobuf timestamp."""
    message = timestamp_pb2.Timestamp()
    message.FromMicroseconds(int(epoch_seconds * 1e6))
    return message


def image_spec(parameters: GenerationParameters) -> image_pb2.ImageSpec:
    """The parameters of a job with every field present; quality only where the format has one."""
    spec = image_pb2.ImageSpec(
        prompt=parameters.prompt,
        negative_prompt=parameters.negative_prompt,
        width=parameters.width,
        height=parameters.height,
        num_inference_steps=parameters.num_inference_steps,
        guidance_scale=parameters.guidance_scale,
        num_images=parameters.num_images,
        seed=parameters.seed,
        output_format=image_pb2.OutputFormat.Value(f"OUTPUT_FORMAT_{parameters.output_format.name}"),
    )
    if parameters.output_format.has_quality:
        spec.quality = parameters.quality
    return spec


def execution(value: Execution) -> job_pb2.Execution:
    """How the images of a job are generated."""
    return job_pb2.Execution(
        model=value.model,
        scheduler=value.scheduler,
        shift=value.shift,
        layout=value.layout,
        attempt=value.attempt,
        weights=value.weights.transformer,
        text_encoder_weights=value.weights.text_encoders,
    )


def progress(value: Progress) -> job_pb2.JobProgress:
    """How far the denoising is."""
    message = job_pb2.JobProgress(
        step=value.step, total_steps=value.total_steps, step_duration=duration(value.step_seconds)
    )
    if value.estimated_remaining_seconds is not None:
        message.estimated_remaining.CopyFrom(duration(value.estimated_remaining_seconds))
    return message


def queued(value: events.Queued) -> job_pb2.Queued:
    """The queue position of a job, and how long it is expected to wait."""
    message = job_pb2.Queued(queue_position=value.queue_position)
    if value.estimated_wait_seconds is not None:
        message.estimated_wait.CopyFrom(duration(value.estimated_wait_seconds))
    return message


def timings(value: Timings) -> job_pb2.JobTimings:
    """Time spent in each stage."""
    return job_pb2.JobTimings(
        queue=duration(value.queue_seconds),
        encode=duration(value.encode_seconds),
        denoise=duration(value.denoise_seconds),
        decode=duration(value.decode_seconds),
        total=duration(value.total_seconds),
    )


def image_info(image: StoredImage) -> image_pb2.ImageInfo:
    """A finished image without its bytes."""
    return image_pb2.ImageInfo(
        index=image.index,
        width=image.width,
        height=image.height,
        seed=image.seed,
        mime_type=image.mime_type,
        size_bytes=image.size_bytes,
        sha256=image.sha256,
    )


def job(value: Job, position: events.Queued | None = None) -> job_pb2.Job:
    """A job as it is at one moment; position is where it waits, None where it does not."""
    submission = value.submission
    message = job_pb2.Job(
        job_id=value.job_id,
        request_id=submission.request_id,
        state=job_pb2.JobState.Value(f"JOB_STATE_{value.state}"),
        spec=image_spec(submission.parameters),
        timings=timings(value.timings),
        images=[image_info(image) for image in value.images],
        priority=job_pb2.Priority.Value(f"PRIORITY_{submission.priority.name}"),
        labels=submission.labels,
        create_time=timestamp(value.create_time),
    )
    if submission.model is not None:
        message.model = submission.model.name
    if value.stage is not None:
        message.stage = job_pb2.JobStage.Value(f"JOB_STAGE_{value.stage}")
    if value.execution is not None:
        message.execution.CopyFrom(execution(value.execution))
    if value.progress is not None:
        message.progress.CopyFrom(progress(value.progress))
    if value.error is not None:
        message.error.CopyFrom(to_status(value.error))
    if value.start_time is not None:
        message.start_time.CopyFrom(timestamp(value.start_time))
    if value.end_time is not None:
        message.end_time.CopyFrom(timestamp(value.end_time))
    if position is not None:
        message.queue_position = position.queue_position
        if position.estimated_wait_seconds is not None:
            message.estimated_wait.CopyFrom(duration(position.estimated_wait_seconds))
    remaining_seconds = _remaining_seconds(value, position)
    if remaining_seconds is not None:
        message.estimated_remaining.CopyFrom(duration(remaining_seconds))
    return message


def _remaining_seconds(value: Job, position: events.Queued | None) -> float | None:
    if value.state is JobState.QUEUED:
        return None if position is None else position.estimated_remaining_seconds
    if value.state is JobState.RUNNING and value.progress is not None:
        return value.progress.estimated_remaining_seconds
    return None


def job_event(event: events.JobEvent, image_data: bytes = b"") -> job_pb2.JobEvent:
    """One event; image_data are the bytes of an ImagePart."""
    message = job_pb2.JobEvent(sequence=event.sequence, time=timestamp(event.time))
    match event.body:
        case events.Queued() as position:
            message.queued.CopyFrom(queued(position))
        case events.Started(parameters, applied, queue_seconds):
            message.started.spec.CopyFrom(image_spec(parameters))
            message.started.execution.CopyFrom(execution(applied))
            message.started.queue_duration.CopyFrom(duration(queue_seconds))
        case events.Progressed(value):
            message.progress.CopyFrom(progress(value))
        case events.Previewed(step, data):
            message.preview.step = step
            message.preview.mime_type = "image/jpeg"
            message.preview.data = data
        case events.Restarted(attempt, reason, resumed_from_step):
            message.restarted.attempt = attempt
            message.restarted.reason = reason
            message.restarted.resumed_from_step = resumed_from_step
        case events.ImagePart(image, offset, _):
            message.image_chunk.image.CopyFrom(image_info(image))
            message.image_chunk.offset = offset
            message.image_chunk.data = image_data
        case events.Succeeded(ended):
            message.succeeded.job.CopyFrom(job(ended))
        case events.Failed(error):
            message.failed.status.CopyFrom(to_status(error))
        case events.Cancelled(reason, _):
            message.cancelled.reason = job_pb2.CancelReason.Value(f"CANCEL_REASON_{reason.value}")
    return message
