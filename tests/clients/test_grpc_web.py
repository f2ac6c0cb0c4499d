"""Browsers and HTTP callers through Envoy, with the configuration that is in deploy/, before two servers."""

from __future__ import annotations

import hashlib
import http.client
import json
import signal
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from hidream.v1 import image_gen_pb2, job_pb2, server_info_pb2
from tests.clients.conftest import STEPS, small_node_program
from tests.support.envoy import HEALTH_CHECK_SECONDS, LiveEnvoy, contract_file, running_envoy
from tests.support.grpc_web import WebCall, web_call
from tests.support.job_calls import get
from tests.support.live_server import LiveServer, running_server, wait_until
from tests.support.streams import Stream, request

PROJECT = Path(__file__).parents[2]
CONFIGURATION = PROJECT / "deploy" / "envoy-web.yaml"
CONTRACT = "/etc/envoy/hidream.pb"
ORIGIN = "https://app.example"
TIMEOUT_SECONDS = 60.0
NUM_CALLERS = 3

# The first run installs the packages of Node.
pytestmark = pytest.mark.timeout(900)


class Web:
    """What callers of the web reach behind one port."""

    def __init__(self, port: int) -> None:
        self._port = port

    @contextmanager
    def generate(self, **changes: Any) -> Iterator[WebCall[image_gen_pb2.GenerateResponse]]:
        """Begin a small image by gRPC-Web."""
        asked = request(**{"width": 64, "height": 64, "num_inference_steps": 1, **changes})
        with web_call(self._port, "Generate", asked, image_gen_pb2.GenerateResponse) as call:
            yield call

    def server_info(self) -> WebCall[server_info_pb2.ServerInfo]:
        """Ask by gRPC-Web what the server is, to the end of the answer."""
        asked = image_gen_pb2.GetServerInfoRequest()
        with web_call(self._port, "GetServerInfo", asked, server_info_pb2.ServerInfo) as call:
            assert len(list(call)) == 1
            return call

    def ask(self, method: str, path: str, **headers: str) -> tuple[http.client.HTTPResponse, bytes]:
        """An answer of plain HTTP, with its body."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=TIMEOUT_SECONDS)
        try:
            connection.request(
                method, path, headers={name.replace("_", "-"): headers[name] for name in headers}
            )
            answer = connection.getresponse()
            return answer, answer.read()
        finally:
            connection.close()


@pytest.fixture(scope="module")
def contract(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file with the contract that Envoy is given."""
    return contract_file(tmp_path_factory.mktemp("contract"))


@pytest.fixture(scope="module")
def envoy(
    server: LiveServer, contract: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LiveEnvoy]:
    files = {CONTRACT: contract}
    with running_envoy(CONFIGURATION, [server.address], tmp_path_factory.mktemp("envoy"), files) as live:
        yield live


@pytest.fixture
def web(envoy: LiveEnvoy) -> Web:
    return Web(envoy.ports["web"])


def test_a_browser_sees_previews_while_its_job_runs_and_leaving_cancels_it(
    web: Web, server: LiveServer
) -> None:
    with server.stub() as stub:
        with web.generate(preview=True, num_inference_steps=150) as call:
            assert call.headers["access-control-allow-origin"] == ORIGIN
            job_id = next(response.job_id for response in call if response.event.HasField("preview"))
            assert get(stub, job_id).state == job_pb2.JOB_STATE_RUNNING
        wait_until(
            lambda: get(stub, job_id).state == job_pb2.JOB_STATE_CANCELLED, TIMEOUT_SECONDS, "it is cancelled"
        )


def test_an_image_arrives_whole_by_grpc_web(web: Web) -> None:
    with web.generate(preview=True) as call:
        stream = Stream(list(call))
    assert call.trailers["grpc-status"] == "0"
    assert {"progress", "preview", "succeeded"} <= {*stream.kinds}
    (image,) = stream.images
    assert hashlib.sha256(image).digest() == stream.job.images[0].sha256


def test_the_program_of_the_page_draws_by_a_library_of_others(
    envoy: LiveEnvoy, contract: Path, node_example: Path, tmp_path: Path
) -> None:
    program = node_example.with_name("generate_web.mjs")
    page = (PROJECT / "docs" / "clients.md").read_text(encoding="utf-8")
    assert f"```javascript\n{program.read_text(encoding='utf-8')}```" in page
    small = small_node_program(program, tmp_path)
    command: list[str | Path] = ["node", small, f"http://127.0.0.1:{envoy.ports['web']}", contract]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == f"step {STEPS} of {STEPS}"
    with PIL.Image.open(tmp_path / "circle.png") as image:
        image.load()


def test_an_error_reaches_a_browser_with_its_details(web: Web) -> None:
    with web.generate(width=63) as call:
        assert list(call) == []
    assert call.trailers["grpc-status"] == "3"
    assert "width" in call.trailers["grpc-message"]
    assert call.trailers["grpc-status-details-bin"]


def test_pages_of_the_origin_that_the_operator_names_may_call_and_no_others(web: Web) -> None:
    path = "/hidream.v1.ImageGen/Generate"
    asks = {"Access_Control_Request_Method": "POST", "Access_Control_Request_Headers": "x-grpc-web"}
    allowed, _ = web.ask("OPTIONS", path, Origin=ORIGIN, **asks)
    assert allowed.status == 200
    assert allowed.headers["access-control-allow-origin"] == ORIGIN
    assert "x-grpc-web" in allowed.headers["access-control-allow-headers"]
    refused, _ = web.ask("OPTIONS", path, Origin="https://other.example", **asks)
    assert refused.headers["access-control-allow-origin"] is None


def test_the_contract_is_json_by_the_annotations_of_the_protos(web: Web) -> None:
    answer, body = web.ask("GET", "/v1/server")
    assert answer.status == 200
    assert json.loads(body)["limits"]["maxNumImages"] > 0
    missing, body = web.ask("GET", "/v1/jobs/00000000-0000-0000-0000-000000000000")
    assert (missing.status, json.loads(body)["code"]) == (404, 5)
    unknown, _ = web.ask("GET", "/v1/server?colour=red")
    assert unknown.status == 400


def test_one_of_two_servers_drains_under_load_and_no_call_fails(
    server: LiveServer, contract: Path, tmp_path: Path
) -> None:
    # Longer than it takes for two health checks to fail.
    drain = ("--drain-delay-seconds", str(10 * HEALTH_CHECK_SECONDS))
    ends = threading.Event()
    with (
        running_server(*drain) as second,
        running_envoy(
            CONFIGURATION, [server.address, second.address], tmp_path, {CONTRACT: contract}
        ) as live,
        ThreadPoolExecutor(NUM_CALLERS) as threads,
    ):
        web = Web(live.ports["web"])

        def call_until_the_end(caller: int) -> list[str]:
            statuses = []
            while not ends.is_set():
                with web.generate(seed=caller) as call:
                    assert Stream(list(call)).kinds[-1] == "succeeded", call.trailers
                statuses += [call.trailers["grpc-status"], web.server_info().trailers["grpc-status"]]
            return statuses

        callers = [threads.submit(call_until_the_end, caller) for caller in range(NUM_CALLERS)]
        try:
            wait_until(lambda: second.info().jobs.running > 0, TIMEOUT_SECONDS, "the second draws too")
            second.process.send_signal(signal.SIGTERM)
            assert second.process.wait(TIMEOUT_SECONDS) == 0
            left = {int(server.address.rpartition(":")[2])}
            wait_until(lambda: live.healthy_ports() == left, TIMEOUT_SECONDS, "Envoy sees that it has ended")
        finally:
            ends.set()
        for caller in callers:
            assert {*caller.result()} == {"0"}
