"""Every limit and default of a request, in one place: validation, the queue and `GetServerInfo` use them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from hidream_grpc.model.parameters import OutputFormat

MAX_TORCH_SEED = 2**32 - 1
"""torch's CPU generator takes the lower 32 bits: larger seeds would repeat the images of others."""


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """What a request is checked against; the fields are those of `hidream.v1.RequestLimits`.

    None means no limit.
    """

    max_prompt_tokens: int
    max_prompt_bytes: int
    size_multiple: int
    min_side_pixels: int
    max_pixels: int
    max_num_inference_steps: int
    max_guidance_scale: float
    max_num_images: int
    max_seed: int
    max_queued_jobs: int
    max_running_jobs: int
    max_streams: int
    max_request_id_bytes: int
    max_labels: int
    max_label_bytes: int
    max_receive_message_bytes: int
    chunk_bytes: int
    max_preview_side_pixels: int
    max_queued_jobs_per_caller: int | None = None
    max_running_jobs_per_caller: int | None = None
    max_pixel_steps_per_minute_per_caller: int | None = None
    max_streams_per_caller: int | None = None
    min_quality: int = 1
    max_quality: int = 100
    max_jpeg_side_pixels: int | None = OutputFormat.JPEG.max_side_pixels
    max_webp_side_pixels: int | None = OutputFormat.WEBP.max_side_pixels
    max_reconnect_window_seconds: int = 300
    max_prompt_tokens_by_encoder: Mapping[str, int] = field(default_factory=dict)

    def max_prompt_tokens_of(self, encoder: str) -> int:
        """Most tokens of a prompt for a text encoder; servers of earlier versions tell only the least."""
        return self.max_prompt_tokens_by_encoder.get(encoder, self.max_prompt_tokens)

    def max_side_pixels(self, output_format: OutputFormat) -> int:
        """Largest width and height of an image that a file of this format can hold."""
        by_format = {
            OutputFormat.JPEG: self.max_jpeg_side_pixels,
            OutputFormat.WEBP: self.max_webp_side_pixels,
        }
        limit = by_format.get(output_format)
        return self.max_pixels if limit is None else limit


@dataclass(frozen=True, slots=True)
class RequestDefaults:
    """The values of absent fields; the fields are those of `hidream.v1.RequestDefaults`."""

    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    num_images: int = 1
    quality: int = 90
