"""Full beside Dev on one store: each job is drawn with the model that checked it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2

from hidream.v1 import image_gen_pb2, job_pb2
from hidream_grpc.model.checkpoint.demo import demo_checkpoint_path
from tests.support.checkpoints import write_variant
from tests.support.job_calls import Stub, cancel, drawn, events, get, refusal, running, submission
from tests.support.live_server import LiveServer, running_server
from tests.support.postgres import PostgresServer
from tests.support.streams import follow, request

FLAGS = (
    *("--devices", "1", "--threads-per-rank", "1", "--max-running-jobs", "1"),
    *("--lease-seconds", "2", "--grace-seconds", "1"),
)


@dataclass(frozen=True)
class Models:
    """A checkpoint of each variant; they have the same weights and another scheduler."""

    full: Path
    dev: Path


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder = tmp_path_factory.mktemp("models")
    full = write_variant(demo_checkpoint_path(), folder / "HiDream-Full", "full")
    dev = write_variant(demo_checkpoint_path(), folder / "HiDream-Dev", "dev")
    return Models(full, dev)


@pytest.fixture(scope="module")
def servers(
    models: Models, postgres: PostgresServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[LiveServer, LiveServer]]:
    """One that draws with Full and one that draws with Dev, on one store."""
    artifacts = tmp_path_factory.mktemp("artifacts")
    with postgres.database() as url:
        flags = ("--store", url, "--artifacts", f"file://{artifacts}", *FLAGS)
        with (
            running_server("--model-path", str(models.full), *flags) as full,
            running_server("--model-path", str(models.dev), *flags) as dev,
        ):
            yield full, dev


@pytest.fixture
def stubs(servers: tuple[LiveServer, LiveServer]) -> Iterator[tuple[Stub, Stub]]:
    with servers[0].stub() as full, servers[1].stub() as dev:
        yield full, dev


def of_model(name: str) -> image_gen_pb2.SubmitJobRequest:
    message = submission()
    message.model = name
    return message


def test_a_request_without_a_model_is_drawn_with_that_of_its_server(stubs: tuple[Stub, Stub]) -> None:
    for stub, name, scheduler in (
        (stubs[0], "HiDream-Full", "UniPCMultistepScheduler"),
        (stubs[1], "HiDream-Dev", "FlowMatchLCMScheduler"),
    ):
        for _ in range(4):
            job = drawn(stub)
            assert (job.state, job.model) == (job_pb2.JOB_STATE_SUCCEEDED, name)
            assert (job.execution.model, job.execution.scheduler) == (name, scheduler)


def test_a_request_may_name_the_model_of_another_server_whose_defaults_are_its_own(
    stubs: tuple[Stub, Stub],
) -> None:
    full, dev = stubs
    message = of_model("HiDream-Dev")
    message.spec.ClearField("num_inference_steps")
    job_id = full.SubmitJob(message).job_id
    assert events(full, job_id)[-1].HasField("succeeded")
    job = get(full, job_id)
    assert (job.model, job.execution.scheduler) == ("HiDream-Dev", "FlowMatchLCMScheduler")
    assert (job.spec.num_inference_steps, job.spec.guidance_scale) == (28, 0)
    assert job == get(dev, job_id)
    named = request(num_inference_steps=2)
    named.model = "HiDream-Dev"
    assert follow(full.Generate(named)).images == follow(dev.Generate(request(num_inference_steps=2))).images


def test_a_model_that_nobody_draws_with_is_refused_and_those_that_live_are_named(
    stubs: tuple[Stub, Stub],
) -> None:
    for stub in stubs:
        (failure,) = refusal(
            partial(stub.SubmitJob, of_model("HiDream-Fast")),
            grpc.StatusCode.FAILED_PRECONDITION,
            error_details_pb2.PreconditionFailure(),
        )
        (violation,) = failure.violations
        assert (violation.type, violation.subject) == ("MODEL", "HiDream-Fast")
        assert "HiDream-Dev, HiDream-Full" in violation.description


def test_a_server_names_the_models_that_live_with_their_fingerprints(
    servers: tuple[LiveServer, LiveServer],
) -> None:
    infos = [server.info() for server in servers]
    (own, other), (again, _) = (info.live_models for info in infos)
    assert (own.name, other.name) == ("HiDream-Full", "HiDream-Dev")
    assert own.fingerprint == infos[0].model.fingerprint != other.fingerprint == again.fingerprint


def test_a_job_waits_in_the_queue_of_its_own_model(stubs: tuple[Stub, Stub]) -> None:
    full, dev = stubs
    busy = running(dev)
    waiting = [dev.SubmitJob(submission()).job_id, full.SubmitJob(of_model("HiDream-Dev")).job_id]
    try:
        assert [get(full, job_id).queue_position for job_id in waiting] == [1, 2]
        assert [get(dev, job_id).queue_position for job_id in waiting] == [1, 2]
        assert drawn(full).state == job_pb2.JOB_STATE_SUCCEEDED, "Dev's work holds up nothing of Full's"
    finally:
        cancel(dev, busy)
    for job_id in waiting:
        assert events(full, job_id)[-1].HasField("succeeded")


@pytest.mark.long
def test_after_a_restart_with_other_weights_no_job_is_drawn_by_two_models(
    models: Models, tmp_path: Path
) -> None:
    other = write_variant(demo_checkpoint_path(), tmp_path / "HiDream-Full", "full")
    (other / "generation_config.json").write_text('{"width": 128, "height": 128}', encoding="utf-8")
    flags = ("--data-dir", str(tmp_path / "data"), *FLAGS)
    with running_server("--model-path", str(models.full), *flags) as server, server.stub() as stub:
        job_id = running(stub, num_inference_steps=60, width=128, height=128)
        server.process.kill()
        server.process.wait()
    with running_server("--model-path", str(other), *flags) as server, server.stub() as stub:
        assert drawn(stub).state == job_pb2.JOB_STATE_SUCCEEDED
        waiting = get(stub, job_id)
        assert waiting.state in (job_pb2.JOB_STATE_QUEUED, job_pb2.JOB_STATE_RUNNING)
        assert waiting.execution.attempt == 1, "nobody has gone on with it"
    with running_server("--model-path", str(models.full), *flags) as server, server.stub() as stub:
        assert events(stub, job_id)[-1].HasField("succeeded")
        assert get(stub, job_id).execution.attempt == 2
