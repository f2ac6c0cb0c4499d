from __future__ import annotations

import base64
import hashlib
import json
import socket
from collections.abc import Iterator
from typing import Any, Literal
from urllib.parse import urlsplit

import httpx
import openai
import pytest

from hidream.client import Client
from hidream.requests import JobStateName
from tests.failure.tcp_proxy import running_proxy
from tests.support.live_bridge import LiveBridge, running_bridge
from tests.support.live_server import LiveServer, wait_until

SIZE = "128x128"
SPEC: dict[str, Any] = {"width": 128, "height": 128, "num_inference_steps": 2, "seed": 7}
SAMPLE = {"seed": 7, "num_inference_steps": 2}
PROMPT = "a red circle"
LONG_STEPS = 150
SECONDS = 60


@pytest.fixture
def client(server: LiveServer) -> Iterator[Client]:
    with Client(server.address) as client:
        yield client


@pytest.fixture(scope="module")
def ai(bridge: LiveBridge) -> Iterator[openai.OpenAI]:
    """The real client of OpenAI's API."""
    with openai.OpenAI(base_url=f"{bridge.url}/v1", api_key="none is asked for", max_retries=0) as ai:
        yield ai


def data_of(text: str | None) -> bytes:
    assert text is not None
    return base64.b64decode(text, validate=True)


def test_an_image_is_that_of_the_grpc_client_with_the_same_seed(ai: openai.OpenAI, client: Client) -> None:
    answer = ai.images.generate(prompt=PROMPT, model="demo", n=1, size=SIZE, user="u-1", extra_body=SAMPLE)
    (image,) = answer.data or []
    (same,) = client.draw(PROMPT, **SPEC)
    assert data_of(image.b64_json) == same.data
    assert (answer.size, answer.output_format, answer.background) == (SIZE, "png", "opaque")
    assert answer.safety_identifier == "u-1"
    newest = next(iter(client.list_jobs(labels={"user": "u-1"})))
    assert newest.end_time.ToSeconds() == answer.created


@pytest.mark.parametrize("output_format", ["jpeg", "webp"])
def test_formats_and_compression_are_those_asked_for(
    ai: openai.OpenAI, client: Client, output_format: Literal["jpeg", "webp"]
) -> None:
    answer = ai.images.generate(
        prompt=PROMPT, size=SIZE, output_format=output_format, output_compression=40, extra_body=SAMPLE
    )
    (same,) = client.draw(PROMPT, **SPEC, output_format=output_format, quality=40)
    assert [data_of(image.b64_json) for image in answer.data or []] == [same.data]


def test_the_url_of_an_image_works(ai: openai.OpenAI, client: Client) -> None:
    answer = ai.images.generate(prompt=PROMPT, n=2, size=SIZE, response_format="url", extra_body=SAMPLE)
    both = client.draw(PROMPT, **SPEC, num_images=2)
    urls = [image.url for image in answer.data or []]
    assert [httpx.get(str(url), trust_env=False).content for url in urls] == [image.data for image in both]


def test_a_stream_brings_partial_images_and_then_the_image(ai: openai.OpenAI, client: Client) -> None:
    # So many steps that one in which the reader was slow leaves others.
    sample = {"seed": 7, "num_inference_steps": 12, "user": "looks"}
    with ai.images.generate(
        prompt=PROMPT, size=SIZE, stream=True, partial_images=3, extra_body=sample
    ) as stream:
        *partial_images, completed = list(stream)
    assert 1 <= len(partial_images) <= 3
    for index, event in enumerate(partial_images):
        assert event.type == "image_generation.partial_image"
        assert (event.partial_image_index, event.size, event.quality) == (index, SIZE, "auto")
        assert event.output_format == "jpeg"
        assert data_of(event.b64_json).startswith(b"\xff\xd8")
    assert completed.type == "image_generation.completed"
    assert (completed.size, completed.output_format, completed.background) == (SIZE, "png", "opaque")
    (job,) = client.list_jobs(labels={"user": "looks"})
    assert hashlib.sha256(data_of(completed.b64_json)).digest() == job.images[0].sha256


def test_a_stream_whose_job_is_cancelled_ends_with_the_error(ai: openai.OpenAI, client: Client) -> None:
    sample = {"num_inference_steps": 40, "user": "is cancelled"}
    with ai.images.generate(
        prompt=PROMPT, size=SIZE, stream=True, partial_images=3, extra_body=sample
    ) as stream:
        assert next(stream).type == "image_generation.partial_image"
        (job,) = client.list_jobs(labels={"user": "is cancelled"})
        client.cancel(job)
        with pytest.raises(openai.APIError, match="cancelled"):
            list(stream)


def test_a_stream_goes_on_when_the_bridge_loses_its_server(server: LiveServer, client: Client) -> None:
    host, _, port = server.address.partition(":")
    sample = {"num_inference_steps": 16, "seed": 7, "user": "is cut"}
    with (
        running_proxy((host, int(port))) as proxy,
        running_bridge(f"127.0.0.1:{proxy.port}") as bridge,
        openai.OpenAI(base_url=f"{bridge.url}/v1", api_key="x", max_retries=0) as ai,
        ai.images.generate(
            prompt=PROMPT, size=SIZE, stream=True, partial_images=3, extra_body=sample
        ) as stream,
    ):
        assert next(stream).type == "image_generation.partial_image"
        proxy.cut()
        proxy.heal()
        *_, completed = stream
    assert completed.type == "image_generation.completed"
    (job,) = client.list_jobs(labels={"user": "is cut"})
    assert hashlib.sha256(data_of(completed.b64_json)).digest() == job.images[0].sha256


async def test_the_asynchronous_client_streams_without_partial_images(bridge: LiveBridge) -> None:
    async with openai.AsyncOpenAI(base_url=f"{bridge.url}/v1", api_key="x", max_retries=0) as ai:
        stream = await ai.images.generate(prompt=PROMPT, n=2, size=SIZE, stream=True, extra_body=SAMPLE)
        types = [event.type async for event in stream]
    assert types == 2 * ["image_generation.completed"]


def test_the_models_are_those_that_live(ai: openai.OpenAI) -> None:
    assert [model.id for model in ai.models.list()] == ["demo"]
    assert ai.models.retrieve("demo").object == "model"
    with pytest.raises(openai.NotFoundError) as refused:
        ai.models.retrieve("gpt-image-9")
    assert refused.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError, match="demo") as refused:
        ai.images.generate(prompt=PROMPT, model="gpt-image-9", size=SIZE)
    assert (refused.value.code, refused.value.param) == ("model_not_found", "model")


REFUSED = [
    ({"size": "1001x1001"}, "size"),
    ({"size": "large"}, "size"),
    ({"n": 0}, "n"),
    ({"n": 2**40}, "n"),
    ({"seed": -1}, "seed"),
    ({"quality": "hd"}, "quality"),
    ({"background": "transparent"}, "background"),
    ({"style": "vivid"}, "style"),
    ({"output_format": "gif"}, "output_format"),
    ({"output_format": "jpeg", "output_compression": 101}, "output_compression"),
    ({"output_compression": 50}, "output_compression"),
    ({"partial_images": 1}, "partial_images"),
    ({"partial_images": 4, "stream": True}, "partial_images"),
    ({"response_format": "url", "stream": True}, "response_format"),
    ({"stream": "yes"}, "stream"),
    ({"user": "u" * 10_000}, "user"),
    ({"sed": 1}, "sed"),
    ({"prompt": 1}, "prompt"),
]


@pytest.mark.parametrize(("parameters", "name"), REFUSED, ids=lambda value: json.dumps(value)[:40])
def test_what_cannot_be_done_is_refused_by_name(
    ai: openai.OpenAI, parameters: dict[str, object], name: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        ai.images.generate(prompt=PROMPT, extra_body=parameters)
    assert refused.value.param == name
    assert refused.value.type == "invalid_request_error"
    assert refused.value.message.count(f"{name}: ") == 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_caller_that_goes_away_cancels_its_job(bridge: LiveBridge, client: Client, stream: bool) -> None:
    identifier = f"leaves {stream}"
    body = {"prompt": PROMPT, "size": "512x512", "num_inference_steps": LONG_STEPS, "user": identifier}
    content = json.dumps(body | {"stream": stream}).encode()
    address = urlsplit(bridge.url)
    with socket.create_connection((address.hostname, address.port)) as connection:
        head = "POST /v1/images/generations HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        jobs = list_until(client, identifier, "RUNNING")
    assert list_until(client, identifier, "CANCELLED") == jobs


def list_until(client: Client, identifier: str, state: JobStateName) -> list[str]:
    """The jobs for somebody, once there are some in a state."""

    def job_ids() -> list[str]:
        found = client.list_jobs(labels={"user": identifier}, states=[state])
        return [job.job_id for job in found]

    wait_until(lambda: bool(job_ids()), SECONDS, f"a job is {state}")
    return job_ids()
