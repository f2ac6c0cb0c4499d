"""What a caller sees when the process group behind its picture fails, and what is left of a dead server."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import grpc
import psutil
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from hidream.v1 import job_pb2
from tests.support.live_server import LiveServer, running_server, wait_until
from tests.support.streams import Stream, follow, read_until, request

NUM_STEPS = 14


@pytest.fixture(scope="module")
def mortal_server() -> Iterator[LiveServer]:
    """A server whose ranks may be killed, quantize when they load, and divide tokens; only for tests here."""
    quantized = ("--weights", "int8", "--text-encoder-weights", "float8")
    with running_server(
        "--layout", "sp=2", "--grace-seconds", "5", "--metrics-port", "0", *quantized
    ) as server:
        yield server


def rank_process(server: LiveServer, rank: int) -> psutil.Process:
    """The process that is this rank now, by its title."""
    for process in server.descendants():
        if " ".join(process.cmdline()).strip() == f"hidream-grpc rank {rank}":
            return process
    raise AssertionError(f"no process is rank {rank}")


@pytest.mark.parametrize(
    "rank", [pytest.param(0, id="rank-0", marks=pytest.mark.long), pytest.param(1, id="rank-1")]
)
def test_a_rank_killed_in_mid_picture_is_replaced_and_the_image_is_the_same(
    mortal_server: LiveServer, rank: int
) -> None:
    generate = request(num_inference_steps=NUM_STEPS, seed=40 + rank, width=64, height=64)
    with mortal_server.stub() as stub:
        undisturbed = follow(stub.Generate(generate))
        before = mortal_server.info()
        victim, survivor = (rank_process(mortal_server, r) for r in (rank, 1 - rank))

        call = stub.Generate(generate)
        head = read_until(call, lambda event: event.progress.step >= 3)
        victim.send_signal(signal.SIGKILL)
        stream = Stream(head + list(call))

        (restarted,) = stream.of_kind("restarted")
        assert f"rank {rank}" in restarted.restarted.reason
        assert restarted.restarted.attempt == 2
        resumed_from_step = restarted.restarted.resumed_from_step
        assert stream.job.state == job_pb2.JOB_STATE_SUCCEEDED
        assert stream.job.execution.attempt == 2
        assert stream.images == undisturbed.images
        sequences = [event.sequence for event in stream.events]
        assert sequences == sorted(set(sequences))
        before_restart, after_restart = (
            [
                e.progress.step
                for e in stream.of_kind("progress")
                if (e.sequence > restarted.sequence) is after
            ]
            for after in (False, True)
        )
        # No step that a caller was told of is taken again.
        assert resumed_from_step >= max(before_restart)
        # A busy reader may miss one: the newest progress is kept.
        assert after_restart == sorted(set(after_restart))
        assert after_restart[0] > resumed_from_step
        assert after_restart[-1] == NUM_STEPS

    after = mortal_server.info()
    assert (after.layout, after.weights, after.text_encoder_weights) == ("sp=2", "int8", "float8")
    assert after.generation > before.generation
    assert after.num_rank_restarts == before.num_rank_restarts + 1
    # The other rank kept its process, and so its weights.
    assert survivor.is_running()


def test_a_rank_killed_while_nothing_runs_is_replaced_before_the_next_request(
    mortal_server: LiveServer,
) -> None:
    before = mortal_server.info().num_rank_restarts
    rank_process(mortal_server, 1).send_signal(signal.SIGKILL)
    wait_until(lambda: mortal_server.info().num_rank_restarts == before + 1, 60, "the rank is replaced")
    with mortal_server.stub() as stub:
        stream = follow(stub.Generate(request(num_inference_steps=2, width=64, height=64)))
    assert not stream.of_kind("restarted")
    assert stream.job.state == job_pb2.JOB_STATE_SUCCEEDED


def test_all_requests_in_flight_survive_the_death_of_a_rank(mortal_server: LiveServer) -> None:
    with mortal_server.stub() as stub:
        calls = [
            stub.Generate(request(num_inference_steps=12, seed=seed, width=side, height=side))
            for seed, side in enumerate((64, 64, 128))
        ]
        heads = [read_until(call, lambda event: event.progress.step >= 2) for call in calls]
        rank_process(mortal_server, 0).send_signal(signal.SIGKILL)
        streams = [Stream(head + list(call)) for head, call in zip(heads, calls, strict=True)]
    assert [stream.job.state for stream in streams] == [job_pb2.JOB_STATE_SUCCEEDED] * 3
    assert all(len(stream.images) == 1 for stream in streams)


def test_a_job_that_crashes_its_group_twice_fails_alone(mortal_server: LiveServer) -> None:
    with mortal_server.stub() as stub:
        call = stub.Generate(request(num_inference_steps=150, width=64, height=64))
        with pytest.raises(grpc.RpcError) as caught:
            for _ in range(2):
                read_until(call, lambda event: event.HasField("progress"))
                rank_process(mortal_server, 0).send_signal(signal.SIGSEGV)
                read_until(call, lambda event: event.HasField("restarted"))
            list(call)
        assert caught.value.code() == grpc.StatusCode.INTERNAL
        status = rpc_status.from_call(caught.value)
        assert status is not None
        error_info = error_details_pb2.ErrorInfo()
        assert status.details[0].Unpack(error_info)
        error_id = error_info.metadata["error_id"]
        wait_until(lambda: error_id in mortal_server.log, 10, "the log has the error id")
        assert "Traceback" not in status.message

        next_job = follow(stub.Generate(request(num_inference_steps=2, width=64, height=64))).job
    assert next_job.state == job_pb2.JOB_STATE_SUCCEEDED


def test_a_job_that_is_cancelled_while_a_rank_is_replaced_does_not_come_back(
    mortal_server: LiveServer,
) -> None:
    with mortal_server.stub() as stub:
        call = stub.Generate(request(num_inference_steps=150, width=64, height=64))
        read_until(call, lambda event: event.progress.step >= 2)
        rank_process(mortal_server, 1).send_signal(signal.SIGKILL)
        assert any(response.event.HasField("restarted") for response in call)
        call.cancel()
        mortal_server.wait_until_idle()
        after = follow(stub.Generate(request(num_inference_steps=2, width=64, height=64)))
    assert after.job.execution.attempt == 1
    assert after.job.state == job_pb2.JOB_STATE_SUCCEEDED


def test_no_process_outlives_a_server_that_is_killed() -> None:
    with running_server("--devices", "0,1", "--grace-seconds", "5") as server:
        descendants = server.descendants()
        # Zygote, store and two ranks.
        assert len(descendants) == 4
        with server.stub() as stub:
            call = stub.Generate(request(num_inference_steps=150, width=64, height=64))
            read_until(call, lambda event: event.progress.step >= 1)
            server.process.send_signal(signal.SIGKILL)
            server.process.wait(10)
            _, alive = psutil.wait_procs(descendants, timeout=10)
            assert not alive
            call.cancel()
