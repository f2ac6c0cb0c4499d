"""From the operator's settings and the checkpoint to what a request may ask for."""

from __future__ import annotations

from hidream_grpc.jobs.limits import MAX_TORCH_SEED, RequestDefaults, RequestLimits
from hidream_grpc.model.checkpoint.description import CheckpointDescription
from hidream_grpc.model.checkpoint.sizes import MAX_PREVIEW_SIDE_PIXELS
from hidream_grpc.settings import Settings

MAX_REQUEST_ID_BYTES = 128
MAX_LABELS = 32
MAX_LABEL_BYTES = 128


def request_limits(settings: Settings, checkpoint: CheckpointDescription) -> RequestLimits:
    """What requests are checked against."""
    return RequestLimits(
        max_prompt_tokens=checkpoint.max_prompt_tokens,
        max_prompt_bytes=settings.max_prompt_bytes,
        size_multiple=checkpoint.size_limits.size_multiple,
        min_side_pixels=checkpoint.size_limits.min_side_pixels,
        max_pixels=checkpoint.size_limits.max_pixels,
        max_num_inference_steps=settings.max_num_inference_steps,
        max_guidance_scale=settings.max_guidance_scale,
        max_num_images=settings.max_num_images,
        # Image i is drawn from seed + i.
        max_seed=MAX_TORCH_SEED - (settings.max_num_images - 1),
        max_queued_jobs=settings.max_queued_jobs,
        max_running_jobs=settings.max_running_jobs,
        max_streams=settings.max_streams,
        max_request_id_bytes=MAX_REQUEST_ID_BYTES,
        max_labels=MAX_LABELS,
        max_label_bytes=MAX_LABEL_BYTES,
        max_receive_message_bytes=settings.max_receive_message_bytes,
        chunk_bytes=settings.chunk_bytes,
        max_preview_side_pixels=MAX_PREVIEW_SIDE_PIXELS,
        max_queued_jobs_per_caller=settings.max_queued_jobs_per_caller,
        max_running_jobs_per_caller=settings.max_running_jobs_per_caller,
        max_pixel_steps_per_minute_per_caller=settings.max_pixel_steps_per_minute_per_caller,
        max_streams_per_caller=settings.max_streams_per_caller,
    )


def request_defaults(limits: RequestLimits, checkpoint: CheckpointDescription) -> RequestDefaults:
    """The checkpoint's, as far as the operator's limits allow."""
    return RequestDefaults(
        width=checkpoint.defaults.width,
        height=checkpoint.defaults.height,
        num_inference_steps=min(checkpoint.defaults.num_inference_steps, limits.max_num_inference_steps),
        guidance_scale=min(checkpoint.defaults.guidance_scale, limits.max_guidance_scale),
    )
