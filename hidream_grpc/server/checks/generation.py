"""Makes a submission of a request message, in which nothing is missing or out of range.

Every violation is collected, so that a caller learns all of them at once. The limits are those that
`GetServerInfo` shows (`jobs/limits.py`).
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from hidream.v1 import image_gen_pb2, image_pb2
from hidream_grpc.errors import FieldViolation, InvalidRequestError
from hidream_grpc.jobs.job import ModelIdentity, Submission
from hidream_grpc.jobs.limits import RequestDefaults, RequestLimits
from hidream_grpc.model.checkpoint.prompt_lengths import padded_prompt_tokens
from hidream_grpc.model.checkpoint.tokenizers.prompt_tokens import TokenCount
from hidream_grpc.model.parameters import OutputFormat
from hidream_grpc.server.checks.submissions import (
    OUTPUT_FORMATS,
    PRIORITIES,
    JobRequest,
    guidance_scale_of,
    submission_of,
)
from hidream_grpc.server.checks.violations import (
    invalid_request,
    label_violations,
    reconnect_window_violations,
    request_id_violations,
)

CountTokens = Callable[[str], tuple[TokenCount, ...]]

MAX_COUNTED_CHARACTERS = 512
"""Prompts of a call that are longer together are counted in a thread: 4,096 bytes take 7 ms."""
REQUESTS_PER_TURN = 25
"""Number of requests of a batch that are checked before other calls have their turn: 3 ms."""


class RequestValidator:
    """Checks requests against one server's limits and fills in its defaults."""

    def __init__(
        self,
        limits: RequestLimits,
        defaults: RequestDefaults,
        count_tokens: CountTokens,
        model: ModelIdentity | None = None,
    ) -> None:
        """Take what a model's requests may ask for, and which model that is."""
        self._model = model
        self._limits = limits
        self._defaults = defaults
        self._count_tokens = count_tokens
        self._counted: dict[str, tuple[TokenCount, ...]] = {}

    async def one(self, request: JobRequest, caller: str, deadline_seconds: float | None) -> Submission:
        """Check a request as `submission` does, without delay for other calls; raises what it raises."""
        await self._count_in_thread([request])
        return self.submission(request, caller, deadline_seconds)

    def submission(self, request: JobRequest, caller: str, deadline_seconds: float | None) -> Submission:
        """Check a request and decide every field that it leaves open.

        Raises:
            InvalidRequestError: with every violation of the request.
        """
        violations: list[FieldViolation] = []
        if not request.HasField("spec"):
            violations.append(FieldViolation("spec", "is required"))
        num_prompt_tokens = self._check_spec(request.spec, violations)
        violations += request_id_violations(request, self._limits)
        if request.priority not in PRIORITIES:
            violations.append(FieldViolation("priority", f"unknown value {request.priority}"))
        violations += label_violations(request.labels, self._limits)
        violations += reconnect_window_violations(request, self._limits)
        if violations:
            raise invalid_request(violations)
        submission = submission_of(
            request,
            caller,
            deadline_seconds,
            self._defaults,
            self._limits.max_seed,
            self._model,
            padded_prompt_tokens(num_prompt_tokens),
        )
        self._check_work(submission.parameters.pixel_steps)
        return submission

    async def batch(
        self, requests: Sequence[image_gen_pb2.SubmitJobRequest], caller: str
    ) -> tuple[Submission, ...]:
        """Check many requests.

        Raises:
            InvalidRequestError: with every violation of every request.
        """
        violations: list[FieldViolation] = []
        submissions: list[Submission] = []
        if not requests:
            violations.append(FieldViolation("requests", "must not be empty"))
        elif len(requests) > self._limits.max_queued_jobs:
            description = (
                f"must be at most {self._limits.max_queued_jobs} (max_queued_jobs), are {len(requests)}"
            )
            raise InvalidRequestError((FieldViolation("requests", description),))
        await self._count_in_thread(requests)
        for index, request in enumerate(requests):
            if index and index % REQUESTS_PER_TURN == 0:
                await asyncio.sleep(0)
            try:
                submissions.append(self.submission(request, caller, deadline_seconds=None))
            except InvalidRequestError as error:
                violations += [
                    FieldViolation(f"requests[{index}].{v.field}", v.description) for v in error.violations
                ]
        if violations:
            raise invalid_request(violations)
        return tuple(submissions)

    async def _count_in_thread(self, requests: Iterable[JobRequest]) -> None:
        """Count the tokens of all prompts, each once, where that takes long enough to delay other calls."""
        max_bytes = self._limits.max_prompt_bytes
        specs = [request.spec for request in requests]
        prompts = {prompt for spec in specs for prompt in (spec.prompt, spec.negative_prompt)}
        # Longer ones are refused without a count.
        countable = [prompt for prompt in prompts if len(prompt) <= max_bytes]
        if sum(map(len, countable)) > MAX_COUNTED_CHARACTERS:
            self._counted = await asyncio.to_thread(
                lambda: {prompt: self._count_tokens(prompt) for prompt in countable}
            )

    def _tokens_of(self, prompt: str) -> tuple[TokenCount, ...]:
        return self._counted.get(prompt) or self._count_tokens(prompt)

    def _check_spec(self, spec: image_pb2.ImageSpec, violations: list[FieldViolation]) -> int:
        """Check a spec; returns the most tokens that any text encoder gets of its prompts."""
        limits = self._limits

        def violate(field: str, description: str) -> None:
            violations.append(FieldViolation(f"spec.{field}", description))

        def check_range(field: str, lowest: int, highest: int) -> None:
            value = getattr(spec, field)
            if spec.HasField(field) and not lowest <= value <= highest:  # type: ignore[arg-type]
                violate(field, f"must be {lowest} to {highest}, is {value}")

        if not spec.prompt.strip():
            violate("prompt", "must not be empty")
        num_prompt_tokens = 0
        for field in ("prompt", "negative_prompt"):
            num_tokens = self._check_prompt(getattr(spec, field), partial(violate, field))
            num_prompt_tokens = max(num_prompt_tokens, num_tokens)
        self._check_size(spec, violate)
        check_range("num_inference_steps", 1, limits.max_num_inference_steps)
        check_range("num_images", 1, limits.max_num_images)
        check_range("quality", limits.min_quality, limits.max_quality)
        guidance_scale = guidance_scale_of(spec, self._defaults)
        # As `ServerInfo` shows it: in 32 bits 7.3 is a little more than 7.3.
        highest_scale = image_pb2.ImageSpec(guidance_scale=limits.max_guidance_scale).guidance_scale
        if not math.isfinite(guidance_scale) or not 0 <= guidance_scale <= highest_scale:
            violate("guidance_scale", f"must be 0 to {limits.max_guidance_scale:g}, is {guidance_scale:g}")
        elif spec.negative_prompt and guidance_scale <= 1:
            violate("negative_prompt", f"needs a guidance_scale above 1, which is {guidance_scale:g}")
        if spec.HasField("seed") and not 0 <= spec.seed <= limits.max_seed:
            violate("seed", f"must be 0 to {limits.max_seed}, is {spec.seed}")
        if spec.output_format not in OUTPUT_FORMATS:
            violate("output_format", f"unknown value {spec.output_format}")
        elif spec.HasField("quality") and not OUTPUT_FORMATS[spec.output_format].has_quality:
            violate("quality", "applies to JPEG and WebP only: PNG loses nothing")
        return num_prompt_tokens

    def _check_prompt(self, prompt: str, violate: Callable[[str], None]) -> int:
        """Check a prompt; returns the most tokens that any text encoder gets of it, 0 where not counted."""
        limits = self._limits
        num_bytes = len(prompt.encode())
        if num_bytes > limits.max_prompt_bytes:
            violate(f"must be at most {limits.max_prompt_bytes} bytes of UTF-8, is {num_bytes}")
            return 0
        if "\0" in prompt:
            violate("must not contain NUL")
            return 0
        counts = self._tokens_of(prompt)
        # The encoder that a shorter prompt fits last.
        tightest = max(counts, key=lambda c: c.num_tokens / limits.max_prompt_tokens_of(c.encoder))
        max_tokens = limits.max_prompt_tokens_of(tightest.encoder)
        if tightest.num_tokens > max_tokens:
            violate(f"must be at most {max_tokens} tokens of {tightest.encoder}, is {tightest.num_tokens}")
        return max(count.num_tokens for count in counts)

    def _check_size(self, spec: image_pb2.ImageSpec, violate: Callable[[str, str], None]) -> None:
        limits = self._limits
        if spec.HasField("width") != spec.HasField("height"):
            violate("height" if spec.HasField("width") else "width", "width and height are given together")
            return
        rule = (
            f"must be a multiple of {limits.size_multiple} from {limits.min_side_pixels} on, "
            f"with width × height at most {limits.max_pixels}"
        )
        output_format = OUTPUT_FORMATS.get(spec.output_format, OutputFormat.PNG)
        max_side = limits.max_side_pixels(output_format)
        if max_side < limits.max_pixels:
            rule += f", and at most {max_side} for {output_format}"
        has_size = spec.HasField("width")
        width = spec.width if has_size else self._defaults.width
        height = spec.height if has_size else self._defaults.height
        sides = {"width": width, "height": height}
        wrong = [
            field
            for field, side in sides.items()
            if not limits.min_side_pixels <= side <= max_side or side % limits.size_multiple
        ]
        if not wrong and width * height > limits.max_pixels:
            wrong = ["width", "height"]
        for field in wrong:
            other_side = sides["height" if field == "width" else "width"]
            nearest = self._nearest_side(sides[field], other_side, max_side)
            violate(field, f"{rule}; is {sides[field]}, the nearest that works is {nearest}")

    def _nearest_side(self, side: int, other_side: int, max_side: int) -> int:
        limits = self._limits
        multiple = limits.size_multiple
        other_side = min(max(limits.min_side_pixels, other_side), max_side)
        highest = min(limits.max_pixels // other_side, max_side) // multiple * multiple
        highest = max(limits.min_side_pixels, highest)
        return min(max(limits.min_side_pixels, round(side / multiple) * multiple), highest)

    def _check_work(self, pixel_steps: int) -> None:
        max_pixel_steps = self._limits.max_pixel_steps_per_minute_per_caller
        if max_pixel_steps is not None and pixel_steps > max_pixel_steps:
            description = (
                f"width × height × num_inference_steps × num_images must be at most {max_pixel_steps} "
                f"(max_pixel_steps_per_minute_per_caller), is {pixel_steps}"
            )
            raise InvalidRequestError((FieldViolation("spec", description),))
