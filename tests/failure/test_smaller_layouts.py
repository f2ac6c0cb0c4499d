"""What a caller and an operator see of a server that loses a device, and gets it back."""

from __future__ import annotations

import signal
import urllib.request
from pathlib import Path

import grpc
import psutil
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from hidream.v1 import job_pb2, server_info_pb2
from tests.support.faulty_ranks import faults
from tests.support.live_server import LiveServer, running_server, wait_until
from tests.support.streams import Stream, follow, read_until, request


def rank_process(server: LiveServer, rank: int) -> psutil.Process:
    """The process that is this rank now, by its title."""
    for process in server.descendants():
        if " ".join(process.cmdline()).strip() == f"hidream-grpc rank {rank}":
            return process
    raise AssertionError(f"no process is rank {rank}")


def num_layout_devices(server: LiveServer) -> float:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.metrics_port}/metrics") as response:
        for line in response.read().decode().splitlines():
            if line.startswith("hidream_layout_devices "):
                return float(line.split()[1])
    raise AssertionError("no such metric")


@pytest.mark.long
def test_a_lost_device_costs_a_restart_and_its_return_another_one(tmp_path: Path) -> None:
    generate = request(num_inference_steps=40, seed=3)
    with faults(tmp_path) as devices, running_server("--devices", "0,1", "--metrics-port", "0") as server:
        assert server.info().layout == "tp=2"
        with server.stub() as stub:
            call = stub.Generate(generate)
            head = read_until(call, lambda event: event.progress.step >= 5)
            devices.break_(1)
            rank_process(server, 1).send_signal(signal.SIGKILL)
            head += read_until(call, lambda event: event.HasField("restarted"))
            smaller = server.info()
            assert (smaller.layout, list(smaller.idle_devices)) == ("tp=1", [1])
            assert len(smaller.devices) == num_layout_devices(server) == 1
            assert server.logged_lines("layout tp=1 from now on, without devices 1")

            devices.repair_all()
            server.process.send_signal(signal.SIGHUP)
            stream = Stream(head + list(call))
            assert stream.job.state == job_pb2.JOB_STATE_SUCCEEDED
            assert len(stream.of_kind("restarted")) == 2
            wait_until(lambda: server.info().layout == "tp=2", 60, "all devices are back")
            assert num_layout_devices(server) == 2
            assert follow(stub.Generate(request(num_inference_steps=2))).job.execution.layout == "tp=2"


@pytest.mark.long
def test_a_server_without_any_device_left_takes_nothing_keeps_what_it_has_and_comes_back(
    tmp_path: Path,
) -> None:
    with faults(tmp_path) as devices, running_server("--devices", "0") as server, server.stub() as stub:
        call = stub.Generate(request(num_inference_steps=40))
        head = read_until(call, lambda event: event.progress.step >= 3)
        devices.break_(0)
        rank_process(server, 0).send_signal(signal.SIGKILL)
        wait_until(
            lambda: server.info().state == server_info_pb2.SERVER_STATE_FAILED, 60, "no device is left"
        )
        with pytest.raises(grpc.RpcError) as refused:
            follow(stub.Generate(request(num_inference_steps=2)))
        assert refused.value.code() == grpc.StatusCode.UNAVAILABLE
        status = rpc_status.from_call(refused.value)
        assert status is not None
        assert any(detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR) for detail in status.details)

        devices.repair_all()
        assert Stream(head + list(call)).job.state == job_pb2.JOB_STATE_SUCCEEDED
        server.wait_until_serving()


def test_a_server_whose_second_device_is_broken_starts_on_the_first(tmp_path: Path) -> None:
    with faults(tmp_path) as devices:
        devices.break_(1)
        with running_server("--devices", "0,1") as server:
            assert server.info().layout == "tp=1"
            with server.stub() as stub:
                job = follow(stub.Generate(request(num_inference_steps=2))).job
    assert job.execution.layout == "tp=1"
