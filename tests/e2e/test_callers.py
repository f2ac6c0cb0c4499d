"""Callers that the operator names: what each may do, which jobs are its own, and how much it may ask for."""

from __future__ import annotations

import hashlib
import socket
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

from hidream.v1 import image_gen_pb2, image_gen_pb2_grpc, job_pb2, server_info_pb2
from hidream_grpc.server.listening import OTHER_CALLS_OF_A_CONNECTION
from tests.support.job_calls import bad_fields, calls_about, not_found
from tests.support.live_server import LiveServer, running_server, wait_until
from tests.support.streams import follow, is_progress, read_until, request

CALLERS = ("alice", "bob", "carol", "dave", "grace")
TOKENS = {name: f"token-of-{name}-0123456789" for name in CALLERS}
WRONG_TOKEN = "token-of-nobody-0123456789"
LONG_STEPS = 150
MAX_PIXEL_STEPS = 128 * 128 * LONG_STEPS * 2
MAX_STREAMS = 4
SETTINGS_MAX_CONCURRENT_STREAMS = 3
"""RFC 9113, 6.5.2."""

Metadata = tuple[tuple[str, str], ...]


def bearer(token: str) -> Metadata:
    return (("authorization", f"Bearer {token}"),)


def line_of(name: str, token: str) -> str:
    """alice's token stands in the file as it is, those of the others as digests."""
    written = token if name == "alice" else f"sha256:{hashlib.sha256(token.encode()).hexdigest()}"
    return f"{name} {written}\n"


KNOWN = "# callers\n" + "".join(line_of(name, token) for name, token in TOKENS.items())


@dataclass(frozen=True)
class Guarded:
    """A server that asks for tokens, and the file that it has them from."""

    server: LiveServer
    path: Path

    def write(self, text: str) -> None:
        """Replace the file whole."""
        fresh = self.path.with_name("fresh")
        fresh.write_text(text, encoding="utf-8")
        fresh.replace(self.path)

    def info(self, metadata: Metadata | None = None) -> server_info_pb2.ServerInfo:
        with self.server.stub() as stub:
            return stub.GetServerInfo(image_gen_pb2.GetServerInfoRequest(), metadata=metadata)

    def knows(self, token: str) -> bool:
        try:
            self.info(bearer(token))
        except grpc.RpcError as error:
            assert error.code() == grpc.StatusCode.UNAUTHENTICATED
            return False
        return True


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    """A server with per-caller limits; whatever was asked of it, no token is in its log."""
    path = tmp_path_factory.mktemp("secret") / "tokens"
    path.write_text(KNOWN, encoding="utf-8")
    flags = {
        "--tokens-file": path,
        "--max-queued-jobs-per-caller": 1,
        "--max-running-jobs-per-caller": 1,
        "--max-pixel-steps-per-minute-per-caller": MAX_PIXEL_STEPS,
        "--max-streams-per-caller": MAX_STREAMS,
        "--grace-seconds": 5,
        "--log-level": "DEBUG",
    }
    with running_server(*(str(word) for flag in flags.items() for word in flag)) as server:
        yield Guarded(server, path)
    for secret in ("token-of-", *(hashlib.sha256(token.encode()).hexdigest() for token in TOKENS.values())):
        assert secret not in server.log


@pytest.fixture
def guarded_stub(guarded: Guarded) -> Iterator[image_gen_pb2_grpc.ImageGenStub]:
    with guarded.server.stub() as stub:
        yield stub


def details_of(error: grpc.RpcError, *messages: Any) -> tuple[Any, ...]:
    """The details of an error, which are of the types of these messages."""
    status = rpc_status.from_call(error)
    assert status is not None
    assert len(status.details) == len(messages)
    for packed, message in zip(status.details, messages, strict=True):
        assert packed.Unpack(message)
    return messages


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ((), "TOKEN_MISSING"),
        (bearer(WRONG_TOKEN), "TOKEN_UNKNOWN"),
        (bearer(TOKENS["alice"][:-1]), "TOKEN_UNKNOWN"),
        (bearer(f"sha256:{hashlib.sha256(TOKENS['alice'].encode()).hexdigest()}"), "TOKEN_UNKNOWN"),
        ((("authorization", f"Basic {TOKENS['alice']}"),), "TOKEN_MALFORMED"),
        ((("authorization", TOKENS["alice"]),), "TOKEN_MALFORMED"),
        ((("authorization", "Bearer "),), "TOKEN_MALFORMED"),
        ((*bearer(WRONG_TOKEN), *bearer(TOKENS["alice"])), "TOKEN_MALFORMED"),
    ],
    ids=["none", "wrong", "almost", "digest", "other scheme", "no scheme", "empty", "two"],
)
def test_who_does_not_bring_a_known_token_is_told_what_is_wrong(
    metadata: Metadata, reason: str, guarded: Guarded, guarded_stub: image_gen_pb2_grpc.ImageGenStub
) -> None:
    calls: list[Callable[[], object]] = [
        lambda: guarded.info(metadata),
        lambda: follow(guarded_stub.Generate(request(), metadata=metadata)),
        # A stranger learns nothing of what else is wrong.
        lambda: follow(guarded_stub.Generate(image_gen_pb2.GenerateRequest(), metadata=metadata)),
    ]
    for call in calls:
        with pytest.raises(grpc.RpcError) as refused:
            call()
        assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED
        (info,) = details_of(refused.value, error_details_pb2.ErrorInfo())
        assert (info.reason, info.domain) == (reason, "hidream.v1")


def test_a_message_of_a_stranger_is_not_even_parsed(guarded: Guarded) -> None:
    with grpc.insecure_channel(guarded.server.address) as channel:
        send: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(
            "/hidream.v1.ImageGen/GetServerInfo"
        )
        for metadata, code in (
            ((), grpc.StatusCode.UNAUTHENTICATED),
            (bearer(TOKENS["dave"]), grpc.StatusCode.INVALID_ARGUMENT),
        ):
            with pytest.raises(grpc.RpcError) as refused:
                send(b"\xff\xff", metadata=metadata)
            assert refused.value.code() == code


@pytest.mark.parametrize("scheme", ["Bearer", "bearer"])
def test_a_known_token_opens_the_door_and_the_log_names_its_caller(scheme: str, guarded: Guarded) -> None:
    num_lines = len(guarded.server.log_lines)
    guarded.info((("authorization", f"{scheme} {TOKENS['bob']}"),))
    assert guarded.server.logged_lines("GetServerInfo OK", "caller=bob", after=num_lines)


def test_health_and_reflection_need_no_token(guarded: Guarded) -> None:
    with grpc.insecure_channel(guarded.server.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", "hidream.v1.ImageGen", "liveness"):
            answer = health.Check(health_pb2.HealthCheckRequest(service=service))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        asked = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        (listed,) = reflection.ServerReflectionInfo(asked)
        assert "hidream.v1.ImageGen" in {s.name for s in listed.list_services_response.service}


def test_a_token_is_known_as_soon_as_it_stands_in_the_file_and_no_longer(guarded: Guarded) -> None:
    token = "token-of-erin-0123456789"
    assert not guarded.knows(token)
    try:
        guarded.write(KNOWN + line_of("erin", token))
        wait_until(lambda: guarded.knows(token), 10, "the new caller is known")
        guarded.write(KNOWN + f"erin {token} and more\n")
        complaint = f"{guarded.path}, line 7: must be a name and a token; the callers stay as they were"
        # The file is looked at when somebody calls.
        wait_until(lambda: guarded.knows(token) and complaint in guarded.server.log, 10, "it is told")
        assert guarded.knows(TOKENS["alice"])
    finally:
        guarded.write(KNOWN)
    wait_until(lambda: not guarded.knows(token), 10, "the caller is forgotten")
    assert guarded.knows(TOKENS["alice"])


def test_a_call_goes_on_when_its_token_is_taken_away(
    guarded: Guarded, guarded_stub: image_gen_pb2_grpc.ImageGenStub
) -> None:
    token = "token-of-frank-0123456789"
    try:
        guarded.write(KNOWN + line_of("frank", token))
        wait_until(lambda: guarded.knows(token), 10, "the new caller is known")
        call = guarded_stub.Generate(request(num_inference_steps=LONG_STEPS), metadata=bearer(token))
        read_until(call, is_progress)
    finally:
        guarded.write(KNOWN)
    wait_until(lambda: not guarded.knows(token), 10, "the caller is forgotten")
    read_until(call, is_progress)
    call.cancel()


def test_the_same_request_id_of_two_callers_is_two_jobs(
    guarded_stub: image_gen_pb2_grpc.ImageGenStub,
) -> None:
    streams = [
        follow(
            guarded_stub.Generate(
                request(num_inference_steps=1, seed=seed, request_id="mine"), metadata=bearer(TOKENS[name])
            )
        )
        for seed, name in enumerate(("bob", "dave"))
    ]
    assert [stream.job.spec.seed for stream in streams] == [0, 1]
    assert len({stream.job.job_id for stream in streams}) == 2


def test_a_job_of_another_caller_is_not_there(guarded_stub: image_gen_pb2_grpc.ImageGenStub) -> None:
    mine, others = bearer(TOKENS["bob"]), bearer(TOKENS["dave"])
    message = request(num_inference_steps=1, seed=11, request_id="private")
    stub = guarded_stub
    stream = follow(stub.Generate(message, metadata=mine))
    job, job_id = stream.job, stream.job.job_id
    for call in calls_about(stub, job_id, metadata=others).values():
        assert not_found(call).resource_name == job_id
    listed = stub.ListJobs(image_gen_pb2.ListJobsRequest(), metadata=others).jobs
    assert job_id not in {job.job_id for job in listed}
    # Nothing that the other asked for was done.
    assert stub.GetJob(image_gen_pb2.GetJobRequest(job_id=job_id), metadata=mine) == job
    image = stub.DownloadImage(image_gen_pb2.DownloadImageRequest(job_id=job_id), metadata=mine)
    assert b"".join(response.chunk.data for response in image) == stream.images[0]


def test_a_running_job_of_another_caller_is_not_cancelled(
    guarded_stub: image_gen_pb2_grpc.ImageGenStub,
) -> None:
    mine, others = bearer(TOKENS["bob"]), bearer(TOKENS["dave"])
    call = guarded_stub.Generate(request(num_inference_steps=LONG_STEPS), metadata=mine)
    job_id = read_until(call, is_progress)[-1].job_id
    for attempt in calls_about(guarded_stub, job_id, metadata=others).values():
        not_found(attempt)
    read_until(call, is_progress)
    call.cancel()


def test_who_watches_all_jobs_is_told_of_the_own_ones_only(
    guarded_stub: image_gen_pb2_grpc.ImageGenStub,
) -> None:
    mine, others = bearer(TOKENS["bob"]), bearer(TOKENS["dave"])
    labels = {"watched": "by bob"}

    def drawn(metadata: Metadata) -> str:
        message = request(num_inference_steps=1)
        message.labels.update(labels)
        return follow(guarded_stub.Generate(message, metadata=metadata)).job.job_id

    drawn(others)
    before = drawn(mine)
    changes = guarded_stub.WatchJobs(image_gen_pb2.WatchJobsRequest(labels=labels), metadata=mine)
    told = [next(changes).job.job_id]
    drawn(others)
    after = drawn(mine)
    for change in changes:
        told.append(change.job.job_id)
        if (change.job.job_id, change.job.state) == (after, job_pb2.JOB_STATE_SUCCEEDED):
            break
    changes.cancel()
    assert list(dict.fromkeys(told)) == [before, after]


def test_a_page_token_of_another_caller_is_none(guarded_stub: image_gen_pb2_grpc.ImageGenStub) -> None:
    mine, others = bearer(TOKENS["bob"]), bearer(TOKENS["dave"])
    for seed in (31, 32):
        follow(guarded_stub.Generate(request(num_inference_steps=1, seed=seed), metadata=mine))

    def page(token: str, metadata: Metadata) -> image_gen_pb2.ListJobsResponse:
        message = image_gen_pb2.ListJobsRequest(page_size=1, page_token=token)
        return guarded_stub.ListJobs(message, metadata=metadata)

    token = page("", mine).next_page_token
    assert page(token, mine).jobs
    assert set(bad_fields(lambda: page(token, others))) == {"page_token"}


def test_limits_are_those_of_one_caller_and_leave_the_others_alone(
    guarded_stub: image_gen_pb2_grpc.ImageGenStub,
) -> None:
    def generate(name: str, steps: int, seed: int = 0) -> Any:
        message = request(num_inference_steps=steps, seed=seed)
        return guarded_stub.Generate(message, metadata=bearer(TOKENS[name]))

    running = generate("alice", LONG_STEPS)
    read_until(running, is_progress)
    # The engine has room for more; alice has not.
    waiting = generate("alice", 1, seed=1)
    assert next(waiting).event.queued.queue_position == 1
    with pytest.raises(grpc.RpcError) as refused:
        follow(generate("alice", 1, seed=2))
    assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    quota, retry = details_of(refused.value, error_details_pb2.QuotaFailure(), error_details_pb2.RetryInfo())
    (violation,) = quota.violations
    assert violation.subject == "alice"
    assert "max_queued_jobs_per_caller is 1" in violation.description
    assert retry.retry_delay.ToNanoseconds() > 0
    # It waits behind nobody.
    assert follow(generate("bob", 1)).job.state == job_pb2.JOB_STATE_SUCCEEDED
    read_until(running, is_progress)
    running.cancel()
    assert follow(waiting).job.state == job_pb2.JOB_STATE_SUCCEEDED


def test_the_work_of_a_minute_is_limited_and_the_caller_told_when_more_fits(
    guarded_stub: image_gen_pb2_grpc.ImageGenStub,
) -> None:
    def generate(**spec: Any) -> Any:
        return guarded_stub.Generate(request(**spec), metadata=bearer(TOKENS["carol"]))

    with pytest.raises(grpc.RpcError) as never:
        follow(generate(num_inference_steps=LONG_STEPS, num_images=3))
    assert never.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    (bad,) = details_of(never.value, error_details_pb2.BadRequest())
    (violation,) = bad.field_violations
    assert violation.field == "spec"
    assert f"{MAX_PIXEL_STEPS} (max_pixel_steps_per_minute_per_caller)" in violation.description

    whole = generate(num_inference_steps=LONG_STEPS, num_images=2)
    read_until(whole, is_progress)
    whole.cancel()
    with pytest.raises(grpc.RpcError) as later:
        follow(generate(num_inference_steps=1))
    assert later.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    quota, retry = details_of(later.value, error_details_pb2.QuotaFailure(), error_details_pb2.RetryInfo())
    (violation,) = quota.violations
    assert violation.subject == "carol"
    assert f"max_pixel_steps_per_minute_per_caller, which is {MAX_PIXEL_STEPS}" in violation.description
    assert 0 < retry.retry_delay.ToTimedelta().total_seconds() <= 60


def test_a_caller_with_all_of_its_streams_open_is_refused_and_others_watch_on(
    guarded_stub: image_gen_pb2_grpc.ImageGenStub,
) -> None:
    stub, mine, labels = guarded_stub, bearer(TOKENS["grace"]), {"watched": "by grace"}
    for name in ("bob", "grace"):
        message = request(num_inference_steps=1)
        message.labels.update(labels)
        job_id = follow(stub.Generate(message, metadata=bearer(TOKENS[name]))).job.job_id
    streams: list[Any] = []

    def watch(name: str) -> None:
        message = image_gen_pb2.WatchJobsRequest(labels=labels)
        changes = stub.WatchJobs(message, metadata=bearer(TOKENS[name]))
        # It is open once it tells of the job that is there.
        next(changes)
        streams.append(changes)

    def can_watch() -> bool:
        try:
            watch("grace")
        except grpc.RpcError as error:
            assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            return False
        return True

    # Her call that drew the job may still be ending.
    for _ in range(MAX_STREAMS):
        wait_until(can_watch, 10, "grace has one stream more")
    one_too_many: list[Callable[[], object]] = [
        lambda: watch("grace"),
        lambda: next(stub.Generate(request(), metadata=mine)),
        lambda: next(stub.WatchJob(image_gen_pb2.WatchJobRequest(job_id=job_id), metadata=mine)),
        lambda: next(stub.DownloadImage(image_gen_pb2.DownloadImageRequest(job_id=job_id), metadata=mine)),
    ]
    for call in one_too_many:
        with pytest.raises(grpc.RpcError) as refused:
            call()
        assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        found = details_of(refused.value, error_details_pb2.QuotaFailure(), error_details_pb2.RetryInfo())
        (violation,) = found[0].violations
        assert violation.subject == "grace"
        assert f"max_streams_per_caller is {MAX_STREAMS}" in violation.description
        assert found[1].retry_delay.ToNanoseconds() > 0
    # What is no stream still answers her.
    assert stub.ListJobs(image_gen_pb2.ListJobsRequest(), metadata=mine).jobs
    watch("bob")

    streams.pop(0).cancel()
    wait_until(can_watch, 10, "grace may open one again")
    assert not can_watch()
    for stream in streams:
        stream.cancel()


def test_a_connection_has_room_for_more_calls_than_there_may_be_streams(guarded: Guarded) -> None:
    host, _, port = guarded.server.address.rpartition(":")
    empty_settings = bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + empty_settings)
        with connection.makefile("rb") as frames:
            header = frames.read(9)
            assert header[3] == empty_settings[3]
            payload = frames.read(int.from_bytes(header[:3], "big"))
    settings = dict(struct.iter_unpack(">HI", payload))
    max_streams = guarded.info(bearer(TOKENS["dave"])).limits.max_streams
    assert settings[SETTINGS_MAX_CONCURRENT_STREAMS] == max_streams + OTHER_CALLS_OF_A_CONNECTION


def test_callers_can_see_their_limits(guarded: Guarded) -> None:
    limits = guarded.info(bearer(TOKENS["dave"])).limits
    assert limits.max_queued_jobs_per_caller == 1
    assert limits.max_running_jobs_per_caller == 1
    assert limits.max_pixel_steps_per_minute_per_caller == MAX_PIXEL_STEPS
    assert limits.max_streams_per_caller == MAX_STREAMS


def test_where_no_tokens_are_configured_everybody_may_call_and_limits_of_callers_are_absent(
    server: LiveServer,
) -> None:
    num_lines = len(server.log_lines)
    with server.stub() as stub:
        limits = stub.GetServerInfo(image_gen_pb2.GetServerInfoRequest(), metadata=bearer(WRONG_TOKEN)).limits
    assert not limits.HasField("max_queued_jobs_per_caller")
    assert not limits.HasField("max_running_jobs_per_caller")
    assert not limits.HasField("max_pixel_steps_per_minute_per_caller")
    assert server.logged_lines("GetServerInfo OK", "caller=ipv4:127.0.0.1 ", after=num_lines)


def test_behind_a_trusted_proxy_the_caller_is_the_one_that_it_names(server: LiveServer) -> None:
    num_lines = len(server.log_lines)
    forwarded = (("x-forwarded-for", "6.6.6.6, 203.0.113.9"),)
    with server.stub() as stub:
        stub.GetServerInfo(image_gen_pb2.GetServerInfoRequest(), metadata=forwarded)
    (line,) = server.logged_lines("GetServerInfo OK", "caller=ipv4:203.0.113.9 ", after=num_lines)
    assert "peer=ipv4:127.0.0.1:" in line
