import inspect
from typing import Any

import pytest
from google.protobuf.message import Message

from hidream import AsyncClient, Client
from hidream.errors import InvalidArgumentError
from hidream.requests import generate_request, job_id_of, list_request, submit_request, watch_jobs_request
from hidream.v1 import image_gen_pb2, image_pb2, job_pb2


def test_every_argument_reaches_its_field() -> None:
    request = generate_request(
        "a red circle",
        negative_prompt="blue",
        width=64,
        height=128,
        num_inference_steps=4,
        guidance_scale=2.5,
        num_images=2,
        seed=2**62,
        output_format="WEBP",
        quality=80,
        request_id="mine",
        preview=True,
        detached=True,
        priority="HIGH",
        labels={"team": "art"},
        model="dev",
    )
    assert request == image_gen_pb2.GenerateRequest(
        spec=image_pb2.ImageSpec(
            prompt="a red circle",
            negative_prompt="blue",
            width=64,
            height=128,
            num_inference_steps=4,
            guidance_scale=2.5,
            num_images=2,
            seed=2**62,
            output_format=image_pb2.OUTPUT_FORMAT_WEBP,
            quality=80,
        ),
        request_id="mine",
        preview=True,
        detached=True,
        priority=job_pb2.PRIORITY_HIGH,
        labels={"team": "art"},
        model="dev",
    )


@pytest.mark.parametrize("client", [Client, AsyncClient])
@pytest.mark.parametrize(
    ("method", "request_type"),
    [
        ("generate", image_gen_pb2.GenerateRequest),
        ("draw", image_gen_pb2.GenerateRequest),
        ("submit", image_gen_pb2.SubmitJobRequest),
    ],
)
def test_every_field_of_the_contract_is_a_keyword_that_editors_complete(
    client: type, method: str, request_type: type[Message]
) -> None:
    fields = {*image_pb2.ImageSpec.DESCRIPTOR.fields_by_name}
    fields |= {*request_type.DESCRIPTOR.fields_by_name}
    parameters = inspect.signature(getattr(client, method)).parameters
    # The window follows from how long the client itself tries again.
    assert {*parameters} - {"self", "timeout_seconds", "policy"} == fields - {"spec", "reconnect_window"}
    request_of = submit_request if method == "submit" else generate_request
    assert {*inspect.signature(request_of).parameters} == fields - {"spec", "reconnect_window"}


def test_names_may_be_written_in_any_case() -> None:
    lower = generate_request("a", output_format="webp", priority="high")
    assert lower == generate_request("a", output_format="WEBP", priority="HIGH")
    assert watch_jobs_request(["queued"], {}) == watch_jobs_request(["QUEUED"], {})


def test_a_job_is_given_by_itself_or_by_its_id() -> None:
    assert job_id_of("job-1") == job_id_of(job_pb2.Job(job_id="job-1")) == "job-1"


def test_a_submitted_job_takes_what_generate_takes_but_to_be_detached() -> None:
    request = submit_request("a", seed=7, priority="LOW", labels={"set": "foxes"})
    assert request == image_gen_pb2.SubmitJobRequest(
        spec=image_pb2.ImageSpec(prompt="a", seed=7), priority=job_pb2.PRIORITY_LOW, labels={"set": "foxes"}
    )
    with pytest.raises(TypeError, match="detached"):
        submit_request("a", detached=True)  # type: ignore[call-arg]


def test_a_list_is_asked_for_by_names_of_states() -> None:
    request = list_request(["QUEUED", "FAILED"], {"set": "foxes"}, page_size=5, page_token="next")
    assert request == image_gen_pb2.ListJobsRequest(
        states=[job_pb2.JOB_STATE_QUEUED, job_pb2.JOB_STATE_FAILED],
        labels={"set": "foxes"},
        page_size=5,
        page_token="next",
    )
    with pytest.raises(InvalidArgumentError) as caught:
        list_request(["DONE"], {}, page_size=0, page_token="")  # type: ignore[list-item]
    assert [violation.field for violation in caught.value.violations] == ["states"]


def test_what_is_not_given_stays_absent_and_is_the_servers_to_decide() -> None:
    absent: dict[str, Any] = dict.fromkeys(set(inspect.signature(generate_request).parameters) - {"prompt"})
    assert generate_request("a", **absent) == generate_request("a")
    assert not generate_request("a").spec.HasField("seed")
    assert not generate_request("a").HasField("model")
    assert generate_request("a", seed=0).spec.HasField("seed")


@pytest.mark.parametrize(
    ("option", "field"),
    [
        pytest.param({"width": 2**31}, "spec.width", id="a number of more bits"),
        pytest.param({"num_inference_steps": 2.5}, "spec.num_inference_steps", id="a fraction"),
        pytest.param({"output_format": "GIF"}, "spec.output_format", id="an unknown format"),
        pytest.param({"priority": "URGENT"}, "priority", id="an unknown priority"),
        pytest.param({"negative_prompt": "\udcff"}, "spec.negative_prompt", id="no UTF-8"),
        pytest.param({"labels": {"count": 3}}, "labels", id="a label that is no text"),
    ],
)
def test_what_no_message_can_carry_is_named(option: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        generate_request("a", **option)
    assert [violation.field for violation in caught.value.violations] == [field]


def test_every_argument_that_cannot_be_carried_is_named_at_once() -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        generate_request("\udcff", seed=2**64)
    assert [violation.field for violation in caught.value.violations] == ["spec.prompt", "spec.seed"]


def test_an_argument_that_does_not_exist_is_a_mistake_of_the_program() -> None:
    with pytest.raises(TypeError, match="guidance"):
        generate_request("a", guidance=3.0)  # type: ignore[call-arg]
