"""A request of OpenAI's images API, and the same as a request of the contract."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError
from starlette.requests import Request

from hidream.requests import generate_request
from hidream.v1 import image_gen_pb2
from hidream_http.json_bodies import require_json
from hidream_http.openai_errors import InvalidParameterError

MAX_PARTIAL_IMAGES = 3
USER_LABEL = "user"
"""The label of the job that carries `user`, or `safety_identifier`."""

_SIZE = re.compile(r"([1-9]\d{0,8})x([1-9]\d{0,8})")
_LOSSLESS = 100
_PARAMETERS = {
    "width": "size",
    "height": "size",
    "num_images": "n",
    "quality": "output_compression",
    "labels": "user",
}


class GenerationBody(BaseModel):
    """The parameters of `POST /v1/images/generations`; absent, null and `auto` are the server's to decide.

    Besides those of OpenAI it takes what the contract has: `seed`, `negative_prompt`, `num_inference_steps`
    and `guidance_scale`. What cannot be done is refused, by name.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str
    model: str | None = None
    n: int | None = None
    size: Annotated[str, Field(pattern=f"^(auto|{_SIZE.pattern})$")] | None = None
    response_format: Literal["b64_json", "url"] | None = None
    output_format: Literal["png", "jpeg", "webp"] | None = None
    output_compression: int | None = None
    stream: bool | None = None
    partial_images: Annotated[int, Field(ge=0, le=MAX_PARTIAL_IMAGES)] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    # The values that mean what the service does anyway.
    quality: Literal["auto", "standard"] | None = None
    background: Literal["auto", "opaque"] | None = None
    moderation: Literal["auto", "low"] | None = None

    seed: int | None = None
    negative_prompt: str | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.partial_images is not None and not self.stream:
            raise _refused("partial_images", "needs stream: true")
        if self.stream and self.response_format == "url":
            raise _refused("response_format", "must be b64_json with stream: true")
        if self._is_lossless and self.output_compression not in (None, _LOSSLESS):
            raise _refused("output_compression", f"must be {_LOSSLESS} for png, which loses nothing")
        return self

    @property
    def identifier(self) -> str | None:
        """The user that the images are for, as the caller calls them."""
        return self.safety_identifier or self.user

    @property
    def _is_lossless(self) -> bool:
        return self.output_format in (None, "png")

    def message(self) -> image_gen_pb2.GenerateRequest:
        """The same as a request of the contract.

        Raises:
            InvalidArgumentError: a number has more bits than the contract has for it.
        """
        match = _SIZE.fullmatch(self.size or "")
        quality = _LOSSLESS if self.output_compression is None else self.output_compression
        return generate_request(
            self.prompt,
            negative_prompt=self.negative_prompt,
            width=int(match[1]) if match else None,
            height=int(match[2]) if match else None,
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            num_images=self.n,
            seed=self.seed,
            output_format=self.output_format,
            quality=None if self._is_lossless else quality,
            preview=bool(self.partial_images),
            labels={USER_LABEL: self.identifier} if self.identifier else None,
            model=self.model,
        )


def parameter_of(path: str) -> str:
    """The parameter that a field of the contract is, such as `size` for `spec.width`."""
    name = re.split(r"[.\[]", path.removeprefix("spec."))[0]
    return _PARAMETERS.get(name, name)


async def read_generation(request: Request) -> GenerationBody:
    """The body of a request.

    Raises:
        InvalidParameterError: it is no JSON, or has parameters or values that it must not have.
        ProblemError: it is said to be something else than JSON, or is too large.
    """
    require_json(request)
    for name in request.query_params:
        raise InvalidParameterError(
            name, f"{name}: stands in the body, not in the query", "unknown_parameter"
        )
    try:
        return GenerationBody.model_validate_json(await request.body())
    except ValidationError as error:
        raise _invalid(error.errors(include_url=False)) from None


def _refused(parameter: str, text: str) -> PydanticCustomError:
    # Its context says which parameter it is: the place of what is wrong with several is empty.
    return PydanticCustomError("invalid_value", "{text}", {"parameter": parameter, "text": text})


_CODES = {
    "missing": "missing_required_parameter",
    "extra_forbidden": "unknown_parameter",
    "literal_error": "invalid_value",
    "string_pattern_mismatch": "invalid_value",
    "greater_than_equal": "invalid_value",
    "less_than_equal": "invalid_value",
    "invalid_value": "invalid_value",
    "json_invalid": "invalid_json",
}
_TEXTS = {
    "missing": "is required",
    "extra_forbidden": "is not a parameter of this service",
}
_HINTS = {
    "quality": "; num_inference_steps and guidance_scale decide about it here",
    "size": "; auto, or WIDTHxHEIGHT in pixels",
}


def _invalid(errors: list[Any]) -> InvalidParameterError:
    parameters = [one.get("ctx", {}).get("parameter") or next(iter(one["loc"]), None) for one in errors]
    texts = [
        f"{parameter or 'the body'}: {_TEXTS.get(one['type'], one['msg'])}{_HINTS.get(str(parameter), '')}"
        for parameter, one in zip(parameters, errors, strict=True)
    ]
    return InvalidParameterError(
        parameters[0], "; ".join(texts), _CODES.get(errors[0]["type"], "invalid_type")
    )
