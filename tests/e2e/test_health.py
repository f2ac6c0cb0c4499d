"""What load balancers, probes and explorers rely on."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
import psutil
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from grpc_status import rpc_status

from hidream.v1 import image_gen_pb2, server_info_pb2
from tests.support.live_server import LiveServer, check_health, running_server, wait_until
from tests.support.streams import follow, request

Status = health_pb2.HealthCheckResponse.ServingStatus
READINESS = ("", "hidream.v1.ImageGen")


@pytest.mark.parametrize("service", READINESS, ids=["empty", "ImageGen"])
def test_check_says_serving_under_both_names(server: LiveServer, service: str) -> None:
    assert check_health(server.address, service) == Status.SERVING


def test_check_of_an_unknown_service_is_not_found(server: LiveServer) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        check_health(server.address, "no.such.Service")
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND


def test_list_names_every_service_with_its_status(server: LiveServer) -> None:
    with grpc.insecure_channel(server.address) as channel:
        response = health_pb2_grpc.HealthStub(channel).List(health_pb2.HealthListRequest())
    assert {name: status.status for name, status in response.statuses.items()} == dict.fromkeys(
        (*READINESS, "liveness"), Status.SERVING
    )


def test_reflection_describes_the_service_without_a_proto_file(server: LiveServer) -> None:
    with grpc.insecure_channel(server.address) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        assert set(database.get_services()) >= {"hidream.v1.ImageGen", "grpc.health.v1.Health"}
        file = database.FindFileContainingSymbol("hidream.v1.ImageGen")
    methods = {method.name for service in file.service for method in service.method}
    assert methods == {m.name for m in image_gen_pb2.DESCRIPTOR.services_by_name["ImageGen"].methods}


@contextmanager
def loading_stopped(server: LiveServer) -> Iterator[Callable[[], None]]:
    """Stop the processes that load the model; a function that lets them go on."""
    stopped: list[psutil.Process] = []

    def go_on() -> None:
        for process in stopped:
            process.resume()
        stopped.clear()

    # One that has not been stopped yet may just have started another.
    while started := [process for process in server.descendants() if process not in stopped]:
        for process in started:
            process.suspend()
        stopped += started
    try:
        yield go_on
    finally:
        go_on()


def test_a_loading_server_answers_but_takes_no_request() -> None:
    limits = ("--max-num-inference-steps", "5", "--max-guidance-scale", "2.5")
    with (
        running_server("--devices", "0", *limits, wait=False) as server,
        loading_stopped(server) as go_on,
        grpc.insecure_channel(server.address) as channel,
        server.stub() as stub,
    ):
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == Status.NOT_SERVING
        assert check_health(server.address, "liveness") == Status.SERVING
        info = server.info()
        assert info.state == server_info_pb2.SERVER_STATE_STARTING
        assert (info.generation, len(info.devices)) == (0, 0)
        # An absent field never means more than the operator allows.
        assert (info.defaults.num_inference_steps, info.defaults.guidance_scale) == (5, 2.5)
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.Generate(request()))
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
        status = rpc_status.from_call(caught.value)
        retry = error_details_pb2.RetryInfo()
        assert status is not None
        assert status.details[0].Unpack(retry)
        assert retry.retry_delay.ToTimedelta().total_seconds() > 0
        go_on()
        # Watch tells the change by itself.
        assert next(watch).status == Status.SERVING
        watch.cancel()


def test_sigterm_lets_a_running_job_end_refuses_new_ones_and_exits_0() -> None:
    with running_server("--grace-seconds", "60") as server:
        with server.stub() as stub, ThreadPoolExecutor() as threads:
            running = stub.Generate(request(num_inference_steps=40))
            assert any(response.event.HasField("progress") for response in running)
            rest = threads.submit(follow, running)
            server.process.send_signal(signal.SIGTERM)
            wait_until(
                lambda: check_health(server.address, "") == Status.NOT_SERVING, 10, "health says NOT_SERVING"
            )
            with pytest.raises(grpc.RpcError) as caught:
                list(stub.Generate(request()))
            assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
            assert len(rest.result().images) == 1
        assert server.process.wait(30) == 0


def test_after_the_grace_period_the_rest_is_told_that_the_server_leaves() -> None:
    with running_server("--grace-seconds", "0.2") as server:
        descendants = server.descendants()
        with server.stub() as stub:
            running = stub.Generate(request(num_inference_steps=150, width=512, height=512))
            assert any(response.event.HasField("progress") for response in running)
            server.process.send_signal(signal.SIGTERM)
            with pytest.raises(grpc.RpcError) as caught:
                list(running)
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
        assert server.process.wait(30) == 0
        wait_until(lambda: not any(p.is_running() for p in descendants), 10, "no process is left")


def test_a_second_sigterm_ends_at_once() -> None:
    with running_server("--grace-seconds", "600") as server, server.stub() as stub:
        running = stub.Generate(request(num_inference_steps=150, width=512, height=512))
        assert any(response.event.HasField("progress") for response in running)
        server.process.send_signal(signal.SIGTERM)
        wait_until(
            lambda: check_health(server.address, "") == Status.NOT_SERVING, 10, "health says NOT_SERVING"
        )
        server.process.send_signal(signal.SIGTERM)
        with pytest.raises(grpc.RpcError):
            list(running)
        assert server.process.wait(30) == 0
