"""What a batch that is refused costs before it is known whether it is a retry."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import cast

import pytest

from hidream.v1 import image_gen_pb2
from hidream_grpc.errors import FieldViolation, InvalidRequestError
from hidream_grpc.jobs.limits import RequestLimits
from hidream_grpc.server.checks.models import ModelChoice
from hidream_grpc.server.checks.requests import MAX_RETRIED_REQUESTS, RequestChecks
from tests.unit.server.checks.test_generation import LIMITS


class RefusingModels:
    """A source of limits whose newest refuse every request."""

    async def validator(self, _name: str | None) -> RefusingModels:
        return self

    async def batch(self, _requests: object, _caller: str) -> object:
        raise InvalidRequestError((FieldViolation("requests[0].spec.width", "must be less"),))


def checks(limits: RequestLimits = LIMITS) -> RequestChecks:
    return RequestChecks(cast(ModelChoice, RefusingModels()), limits)


def requests(number: int) -> list[image_gen_pb2.SubmitJobRequest]:
    return [image_gen_pb2.SubmitJobRequest(request_id=f"request-{index}") for index in range(number)]


async def test_a_refused_batch_may_be_a_retry_up_to_what_an_earlier_queue_may_have_held() -> None:
    checked = await checks().batch(requests(MAX_RETRIED_REQUESTS), "caller")
    assert isinstance(checked.refusal, InvalidRequestError)
    assert checked.submissions[-1].request_id == "request-999"
    with pytest.raises(InvalidRequestError):
        await checks().batch(requests(MAX_RETRIED_REQUESTS + 1), "caller")
    roomy = replace(LIMITS, max_queued_jobs=MAX_RETRIED_REQUESTS + 1)
    assert (await checks(roomy).batch(requests(MAX_RETRIED_REQUESTS + 1), "caller")).refusal is not None


async def test_other_calls_have_their_turns_while_a_refused_batch_is_looked_up() -> None:
    looking_up = asyncio.create_task(checks().batch(requests(MAX_RETRIED_REQUESTS), "caller"))
    num_turns = 0
    while not looking_up.done():
        await asyncio.sleep(0)
        num_turns += 1
    assert num_turns >= 10
