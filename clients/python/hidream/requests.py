"""Requests from keyword arguments, in one place for both transports."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypedDict, Unpack

from hidream.errors import FieldViolation, InvalidArgumentError
from hidream.v1 import image_gen_pb2, image_pb2, job_pb2

OutputFormat = Literal["PNG", "JPEG", "WEBP"]
Priority = Literal["LOW", "NORMAL", "HIGH"]


class GenerateOptions(TypedDict, total=False):
    """What `generate` and `draw` take besides the prompt; absent and None mean the server's default.

    Ranges and defaults are the server's (`info().limits`, `info().defaults`); what each means in
    full stands in `protos/hidream/v1/image.proto`.

    Attributes:
        negative_prompt: what to keep away from; works through guidance.
        width, height: in pixels; both or neither.
        num_inference_steps: denoising steps.
        guidance_scale: how closely to follow the prompt; 1 or less is none, in half the time.
        num_images: image i is drawn from seed + i.
        seed: of image 0; the server picks one when absent, and `Started.spec` says which.
        output_format: file format of the images.
        quality: of JPEG and WebP, 1 to 100.
        request_id: a name for this request, so that a retry does not draw twice.
        preview: also send a small picture after each step.
        detached: let the job go on when the call ends early.
        priority: which jobs go first when several wait.
        labels: free labels, to find the job again.
    """

    negative_prompt: str | None
    width: int | None
    height: int | None
    num_inference_steps: int | None
    guidance_scale: float | None
    num_images: int | None
    seed: int | None
    output_format: OutputFormat | None
    quality: int | None
    request_id: str | None
    preview: bool | None
    detached: bool | None
    priority: Priority | None
    labels: Mapping[str, str] | None


def generate_request(prompt: str, **options: Unpack[GenerateOptions]) -> image_gen_pb2.GenerateRequest:
    """The request for these arguments.

    Only what cannot be written into the message is refused here (a number of 65 bits, an unknown
    format, text that is no UTF-8); every limit is the server's to check.

    Raises:
        InvalidArgumentError: names every such argument.
        TypeError: there is no such argument.
    """
    request = image_gen_pb2.GenerateRequest(spec=image_pb2.ImageSpec())
    violations = []
    for name, value in {"prompt": prompt, **options}.items():
        if value is None:
            continue
        is_of_spec = name in image_pb2.ImageSpec.DESCRIPTOR.fields_by_name
        if not is_of_spec and name not in image_gen_pb2.GenerateRequest.DESCRIPTOR.fields_by_name:
            raise TypeError(f"unexpected keyword argument {name!r}")
        try:
            _set(request.spec if is_of_spec else request, name, value)
        except (TypeError, ValueError) as error:
            violations.append(FieldViolation(f"spec.{name}" if is_of_spec else name, str(error)))
    if violations:
        raise InvalidArgumentError.from_violations(tuple(violations))
    return request


def _set(message: image_pb2.ImageSpec | image_gen_pb2.GenerateRequest, name: str, value: Any) -> None:
    match name:
        case "labels":
            message.labels.update(value)  # type: ignore[union-attr]
        case "output_format":
            message.output_format = image_pb2.OutputFormat.Value(f"OUTPUT_FORMAT_{value}")  # type: ignore
        case "priority":
            message.priority = job_pb2.Priority.Value(f"PRIORITY_{value}")  # type: ignore
        case _:
            setattr(message, name, value)
