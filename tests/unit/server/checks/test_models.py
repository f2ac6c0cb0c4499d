"""A request is checked against the model that it names, where a live server draws with it."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import pytest

from hidream.v1 import image_gen_pb2, image_pb2
from hidream_grpc.errors import InvalidRequestError, ModelNotServedError
from hidream_grpc.jobs.job import ModelIdentity
from hidream_grpc.jobs.replicas.membership import LiveModel
from hidream_grpc.server.checks.models import ModelChoice, requested_model, requested_model_of_all
from tests.unit.server.checks.test_generation import DEFAULTS, LIMITS, count_words

DEV = ModelIdentity("HiDream-I1-Dev", "dev", "0123456789abcdef")
FULL = ModelIdentity("HiDream-I1-Full", "full", "fedcba9876543210")
OTHER = ModelIdentity("demo", "full", "00000000deadbeef")
TOKENIZERS = "0011223344556677"


MODELS = {
    OTHER.name: LiveModel(OTHER, "other", "UniPCMultistepScheduler", 3.0, LIMITS, DEFAULTS),
    DEV.name: LiveModel(DEV, TOKENIZERS, "FlowMatchLCMScheduler", 3.0, LIMITS, DEFAULTS),
    FULL.name: LiveModel(
        FULL,
        TOKENIZERS,
        "UniPCMultistepScheduler",
        3.0,
        dataclasses.replace(LIMITS, max_num_inference_steps=10),
        dataclasses.replace(DEFAULTS, num_inference_steps=5),
    ),
}


class TwoModels:
    """A server with the one model, beside another that has fewer steps and other defaults."""

    async def model(self, name: str | None) -> LiveModel:
        try:
            return MODELS[name or DEV.name]
        except KeyError:
            raise ModelNotServedError(name or "", tuple(MODELS)) from None


@pytest.fixture
def choice() -> ModelChoice:
    return ModelChoice(cast(Any, TwoModels()), count_words)


def spec(**fields: Any) -> image_pb2.ImageSpec:
    return image_pb2.ImageSpec(prompt="a red circle", **fields)


async def test_a_request_that_names_no_model_is_for_the_one_of_the_server_that_is_asked(
    choice: ModelChoice,
) -> None:
    request = image_gen_pb2.GenerateRequest(spec=spec())
    submission = (await choice.validator(requested_model(request))).submission(request, "me", None)
    assert submission.model == DEV
    assert submission.parameters.num_inference_steps == DEFAULTS.num_inference_steps


async def test_a_request_is_checked_against_the_model_that_it_names(choice: ModelChoice) -> None:
    request = image_gen_pb2.SubmitJobRequest(spec=spec(), model=FULL.name)
    validator = await choice.validator(requested_model(request))
    submission = validator.submission(request, "me", None)
    assert (submission.model, submission.parameters.num_inference_steps) == (FULL, 5)
    with pytest.raises(InvalidRequestError) as refused:
        validator.submission(image_gen_pb2.SubmitJobRequest(spec=spec(num_inference_steps=11)), "me", None)
    assert [violation.field for violation in refused.value.violations] == ["spec.num_inference_steps"]


async def test_a_model_that_nobody_draws_with_is_refused_also_where_its_name_is_empty(
    choice: ModelChoice,
) -> None:
    with pytest.raises(ModelNotServedError):
        await choice.validator("HiDream-I1-Fast")
    assert requested_model(image_gen_pb2.GenerateRequest(spec=spec(), model="")) == ""


def test_a_batch_is_for_one_model() -> None:
    named = image_gen_pb2.SubmitJobRequest(spec=spec(), model=DEV.name)
    unnamed = image_gen_pb2.SubmitJobRequest(spec=spec())
    assert requested_model_of_all([named, named]) == DEV.name
    assert requested_model_of_all([unnamed, unnamed]) is None
    assert requested_model_of_all([]) is None
    with pytest.raises(InvalidRequestError) as refused:
        requested_model_of_all([named, unnamed, named, unnamed])
    assert [violation.field for violation in refused.value.violations] == [
        "requests[1].model",
        "requests[3].model",
    ]


async def test_a_model_whose_prompts_cannot_be_counted_here_is_refused(choice: ModelChoice) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        await choice.validator(OTHER.name)
    (violation,) = caught.value.violations
    assert violation.field == "model"
    assert "other tokenizers" in violation.description
