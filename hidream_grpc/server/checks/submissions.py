"""Makes a submission of a request message, as the caller sent it: nothing is checked here."""

from __future__ import annotations

import hashlib
import uuid
from typing import TypeAlias

from google.protobuf.message import Message

from hidream.v1 import image_gen_pb2, image_pb2, job_pb2
from hidream_grpc.engine.requests import Priority
from hidream_grpc.jobs.job import ModelIdentity, Submission
from hidream_grpc.jobs.limits import MAX_TORCH_SEED, RequestDefaults
from hidream_grpc.model.checkpoint.prompt_lengths import TRAINED_PROMPT_TOKENS
from hidream_grpc.model.parameters import GenerationParameters, OutputFormat

JobRequest: TypeAlias = image_gen_pb2.GenerateRequest | image_gen_pb2.SubmitJobRequest

OUTPUT_FORMATS = {
    image_pb2.OUTPUT_FORMAT_UNSPECIFIED: OutputFormat.PNG,
    image_pb2.OUTPUT_FORMAT_PNG: OutputFormat.PNG,
    image_pb2.OUTPUT_FORMAT_JPEG: OutputFormat.JPEG,
    image_pb2.OUTPUT_FORMAT_WEBP: OutputFormat.WEBP,
}
PRIORITIES = {
    job_pb2.PRIORITY_UNSPECIFIED: Priority.NORMAL,
    job_pb2.PRIORITY_LOW: Priority.LOW,
    job_pb2.PRIORITY_NORMAL: Priority.NORMAL,
    job_pb2.PRIORITY_HIGH: Priority.HIGH,
}
NO_DEFAULTS = RequestDefaults(width=0, height=0, num_inference_steps=0, guidance_scale=0.0)
"""What stands for a field that a retry left open: the job that it finds knows what was applied."""
DIGEST_VERSION = "sent-1"
"""The version of the rule that `_digest` follows; digests of two rules are not compared."""
_OPTIONAL_PARAMETERS = tuple(
    field.name for field in image_pb2.ImageSpec.DESCRIPTOR.fields if field.has_presence
)


def submission_of(
    request: JobRequest,
    caller: str,
    deadline_seconds: float | None,
    defaults: RequestDefaults = NO_DEFAULTS,
    max_seed: int = MAX_TORCH_SEED,
    model: ModelIdentity | None = None,
    prompt_tokens: int = TRAINED_PROMPT_TOKENS,
) -> Submission:
    """The submission that a request asks for; what it leaves out comes from the defaults and the model."""
    request_id = request.request_id or uuid.uuid4().hex
    spec = request.spec
    left_open = [name for name in _OPTIONAL_PARAMETERS if not spec.HasField(name)]  # type: ignore[arg-type]
    return Submission(
        parameters=GenerationParameters(
            prompt=spec.prompt,
            negative_prompt=spec.negative_prompt,
            width=_given(spec, "width", defaults.width),
            height=_given(spec, "height", defaults.height),
            num_inference_steps=_given(spec, "num_inference_steps", defaults.num_inference_steps),
            guidance_scale=guidance_scale_of(spec, defaults),
            num_images=_given(spec, "num_images", defaults.num_images),
            seed=_given(spec, "seed", _seed_of(request_id, max_seed)),
            output_format=OUTPUT_FORMATS.get(spec.output_format, OutputFormat.PNG),
            quality=_given(spec, "quality", defaults.quality),
            with_previews=request.preview,
            prompt_tokens=prompt_tokens,
        ),
        request_id=request_id,
        caller=caller,
        priority=PRIORITIES.get(request.priority, Priority.NORMAL),
        labels=dict(request.labels),
        is_detached=_is_detached(request),
        deadline_seconds=deadline_seconds,
        model=model,
        request_digest=_digest(request),
        left_open=(*left_open, *(() if request.HasField("model") else ("model",))),
    )


def guidance_scale_of(spec: image_pb2.ImageSpec, defaults: RequestDefaults) -> float:
    """The guidance scale that a spec names, or else the default."""
    return spec.guidance_scale if spec.HasField("guidance_scale") else defaults.guidance_scale


def reconnect_window_seconds(request: JobRequest) -> float:
    """How long the job of a request goes on after its call was lost; 0 where the request does not say."""
    if isinstance(request, image_gen_pb2.SubmitJobRequest):
        return 0.0
    window = request.reconnect_window
    return float(window.seconds) + window.nanos / 1e9


def _digest(request: JobRequest) -> str:
    """A digest of all that the caller sent but the request id: a field left out differs from its default.

    `SubmitJob` and a detached `Generate` that ask for the same have the same digest.
    """
    content = image_gen_pb2.GenerateRequest(
        spec=request.spec if request.HasField("spec") else None,
        preview=request.preview,
        detached=_is_detached(request),
        priority=request.priority,
        labels=request.labels,
        model=request.model if request.HasField("model") else None,
    )
    # Fields of a newer contract: in the spec they are copied with it.
    unknown = type(request)()
    unknown.CopyFrom(request)  # type: ignore[arg-type]
    for field in request.DESCRIPTOR.fields:
        unknown.ClearField(field.name)  # type: ignore[arg-type]
    digest = hashlib.sha256(content.SerializeToString(deterministic=True))
    digest.update(hashlib.sha256(unknown.SerializeToString()).digest())
    return f"{DIGEST_VERSION}:{digest.hexdigest()}"


def _is_detached(request: JobRequest) -> bool:
    return isinstance(request, image_gen_pb2.SubmitJobRequest) or request.detached


def _given(message: Message, field: str, default: int) -> int:
    value = getattr(message, field) if message.HasField(field) else default
    return int(value)


def _seed_of(request_id: str, max_seed: int) -> int:
    """A seed for a request that names none: a retry with the same request id asks for the same image."""
    return int.from_bytes(hashlib.sha256(request_id.encode()).digest()[:8]) % (max_seed + 1)
