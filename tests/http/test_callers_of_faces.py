"""What tokens and full queues mean to the clients of the replaced server and of OpenAI's API."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from hidream.client import Client
from tests.support.live_bridge import LiveBridge, running_bridge
from tests.support.live_server import LiveServer, running_server, wait_until

TOKEN = "0123456789abcdef-of-alice"
PROMPT = "a red circle"
SIZE = "128x128"
LONG: dict[str, Any] = {"width": 512, "height": 512, "num_inference_steps": 150}
SECONDS = 60


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server that asks for tokens, runs one job, and has room for another one."""
    tokens = tmp_path_factory.mktemp("tokens") / "tokens"
    tokens.write_text(f"alice {TOKEN}\n")
    flags = ("--tokens-file", str(tokens), "--max-running-jobs", "1", "--max-queued-jobs", "1")
    with running_server(*flags) as live:
        yield live


@pytest.fixture(scope="module")
def narrow_bridge(narrow: LiveServer) -> Iterator[LiveBridge]:
    with running_bridge(narrow.address) as live:
        yield live


@pytest.fixture
def client(narrow: LiveServer) -> Iterator[Client]:
    with Client(narrow.address, token=TOKEN) as client:
        yield client
        for job in client.list_jobs(states=["QUEUED", "RUNNING"]):
            client.cancel(job)


def fill(client: Client) -> None:
    """Leave no room in the queue."""
    first = client.submit(PROMPT, **LONG)
    wait_until(lambda: client.status(first).HasField("start_time"), SECONDS, "the job runs")
    client.submit(PROMPT, **LONG)


def test_a_wrong_api_key_is_an_authentication_error(narrow_bridge: LiveBridge) -> None:
    ai = openai.OpenAI(base_url=f"{narrow_bridge.url}/v1", api_key="of nobody", max_retries=0)
    with ai, pytest.raises(openai.AuthenticationError) as refused:
        ai.images.generate(prompt=PROMPT, size=SIZE)
    assert refused.value.code == "invalid_api_key"


def test_without_a_server_callers_are_told_to_try_again_elsewhere() -> None:
    with running_bridge("127.0.0.1:1") as bridge:
        ai = openai.OpenAI(base_url=f"{bridge.url}/v1", api_key=TOKEN, max_retries=0)
        with ai, pytest.raises(openai.InternalServerError) as refused:
            ai.images.generate(prompt=PROMPT, size=SIZE)
        assert (refused.value.status_code, refused.value.type) == (503, "server_error")
        with bridge.client() as http:
            for answer in (http.post("/submit", json={"prompt": PROMPT}), http.get("/health")):
                assert (answer.status_code, list(answer.json())) == (503, ["detail"])


def test_the_token_of_the_caller_is_the_bearer_token(narrow_bridge: LiveBridge) -> None:
    with narrow_bridge.client() as http:
        for path in ("/health", "/v1/models"):
            assert http.get(path).status_code == 401
            assert http.get(path, headers={"Authorization": f"Bearer {TOKEN}"}).status_code == 200


def test_a_full_queue_is_a_rate_limit_with_the_time_to_wait(
    narrow_bridge: LiveBridge, client: Client
) -> None:
    fill(client)
    ai = openai.OpenAI(base_url=f"{narrow_bridge.url}/v1", api_key=TOKEN, max_retries=0)
    with ai, pytest.raises(openai.RateLimitError) as refused:
        ai.images.generate(prompt=PROMPT, size=SIZE)
    assert refused.value.code == "rate_limit_exceeded"
    assert int(refused.value.response.headers["retry-after"]) >= 1
    with narrow_bridge.client(headers={"Authorization": f"Bearer {TOKEN}"}) as http:
        refusal = http.post("/submit", json={"prompt": PROMPT})
    assert (refusal.status_code, list(refusal.json())) == (429, ["detail"])
    assert int(refusal.headers["retry-after"]) >= 1


def test_the_clients_own_retry_waits_for_room(narrow_bridge: LiveBridge, client: Client) -> None:
    fill(client)
    statuses = []

    def make_room(response: Any) -> None:
        statuses.append(response.status_code)
        if response.status_code == 429:
            for job in client.list_jobs(states=["QUEUED", "RUNNING"]):
                client.cancel(job)

    own_client = openai.DefaultHttpxClient(event_hooks={"response": [make_room]}, trust_env=False)
    with openai.OpenAI(base_url=f"{narrow_bridge.url}/v1", api_key=TOKEN, http_client=own_client) as ai:
        answer = ai.images.generate(prompt=PROMPT, size=SIZE, extra_body={"num_inference_steps": 2})
    assert statuses == [429, 200]
    assert len(answer.data or []) == 1
