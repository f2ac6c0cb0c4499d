"""Finds the model that a request is for, and what the request is checked against."""

from __future__ import annotations

from collections.abc import Sequence

from hidream.v1 import image_gen_pb2
from hidream_grpc.errors import FieldViolation, InvalidRequestError
from hidream_grpc.jobs.service import JobService
from hidream_grpc.server.checks.generation import CountTokens, RequestValidator


class ModelChoice:
    """The models of the live servers of this job store.

    Args:
        count_tokens: counts the tokens of a prompt for the text encoders of this server's model.
    """

    def __init__(self, jobs: JobService, count_tokens: CountTokens) -> None:
        self._jobs = jobs
        self._count_tokens = count_tokens

    async def validator(self, name: str | None) -> RequestValidator:
        """The checks of a request for a model; None is for this server's model.

        Raises:
            ModelNotServedError: no live server has the model.
            InvalidRequestError: this server cannot count the tokens of a prompt for the model.
            StoreUnavailableError: it cannot be found out which models are served.
        """
        model, own = await self._jobs.model(name), await self._jobs.model(None)
        if model.tokenizer_fingerprint != own.tokenizer_fingerprint:
            # The server that generates would cut a prompt that is too long for it.
            description = f"{name} has other tokenizers than {own.identity.name}: ask a server that serves it"
            raise InvalidRequestError((FieldViolation("model", description),))
        return RequestValidator(model.limits, model.defaults, self._count_tokens, model.identity)


def requested_model(request: image_gen_pb2.GenerateRequest | image_gen_pb2.SubmitJobRequest) -> str | None:
    """The model that a request names; None where it names none."""
    return request.model if request.HasField("model") else None


def requested_model_of_all(requests: Sequence[image_gen_pb2.SubmitJobRequest]) -> str | None:
    """The model that all requests of a batch name; raises InvalidRequestError where they differ."""
    names = [requested_model(request) for request in requests]
    violations = tuple(
        FieldViolation(f"requests[{index}].model", "must be the same in all requests of a batch")
        for index, name in enumerate(names)
        if name != names[0]
    )
    if violations:
        raise InvalidRequestError(violations)
    return names[0] if names else None
