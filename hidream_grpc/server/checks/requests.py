"""Checks requests for jobs; one that cannot become a job now may be the retry of one that did."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from hidream.v1 import image_gen_pb2
from hidream_grpc.errors import InvalidRequestError, ModelNotServedError, RequestError
from hidream_grpc.jobs.job import Submission
from hidream_grpc.jobs.limits import RequestLimits
from hidream_grpc.server.checks.generation import RequestValidator
from hidream_grpc.server.checks.models import ModelChoice, requested_model, requested_model_of_all
from hidream_grpc.server.checks.submissions import JobRequest, submission_of
from hidream_grpc.server.checks.violations import request_id_violations

MAX_RETRIED_REQUESTS = 1_000
"""A refused batch of so many, or of as many as the queue may hold now, is looked up: under an earlier
`--max-queued-jobs` it may have been accepted. 16 times the default; a larger one is refused at once."""

_REQUESTS_PER_TURN = 100
"""Number of requests of a batch that are looked up before other calls have their turn."""


@dataclass(frozen=True, slots=True)
class CheckedRequests:
    """The jobs that the requests of one call ask for.

    Attributes:
        refusal: why they cannot become new jobs; None where they can.
    """

    submissions: tuple[Submission, ...]
    refusal: RequestError | None = None


class RequestChecks:
    """Checks requests against the model that they name.

    Limits, defaults and models change while a job is kept. What was accepted under earlier ones is found by a
    retry under the newer ones: such a request is refused only when the job store holds no job of it.
    """

    def __init__(self, models: ModelChoice, limits: RequestLimits) -> None:
        self._models = models
        self._limits = limits

    async def one(
        self, request: JobRequest, caller: str, deadline_seconds: float | None = None
    ) -> CheckedRequests:
        """Check one request.

        Raises:
            InvalidRequestError, ModelNotServedError: it is refused, and no retry.
            StoreUnavailableError: it cannot be found out which models are served.
        """

        async def check(validator: RequestValidator) -> tuple[Submission, ...]:
            return (await validator.one(request, caller, deadline_seconds),)

        return await self._checked([request], caller, deadline_seconds, requested_model(request), check)

    async def batch(self, requests: Sequence[image_gen_pb2.SubmitJobRequest], caller: str) -> CheckedRequests:
        """Check many requests; raises what `one` raises."""
        return await self._checked(
            requests,
            caller,
            None,
            requested_model_of_all(requests),
            lambda validator: validator.batch(requests, caller),
        )

    async def _checked(
        self,
        requests: Sequence[JobRequest],
        caller: str,
        deadline_seconds: float | None,
        model: str | None,
        check: Callable[[RequestValidator], Awaitable[tuple[Submission, ...]]],
    ) -> CheckedRequests:
        try:
            return CheckedRequests(await check(await self._models.validator(model)))
        except (InvalidRequestError, ModelNotServedError) as refusal:
            if not self._may_be_retries(requests):
                raise
            sent: list[Submission] = []
            for index, request in enumerate(requests):
                if index % _REQUESTS_PER_TURN == 0:
                    await asyncio.sleep(0)
                sent.append(submission_of(request, caller, deadline_seconds))
            return CheckedRequests(tuple(sent), refusal)

    def _may_be_retries(self, requests: Sequence[JobRequest]) -> bool:
        """Whether all of the requests have names under which their jobs may be kept."""
        max_requests = max(MAX_RETRIED_REQUESTS, self._limits.max_queued_jobs)
        return 0 < len(requests) <= max_requests and all(
            request.request_id and not request_id_violations(request, self._limits) for request in requests
        )
