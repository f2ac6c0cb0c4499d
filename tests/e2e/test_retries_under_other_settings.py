"""A retry finds what was accepted, after a restart with other defaults, other limits and another model."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2

from hidream.v1 import image_gen_pb2, image_pb2, job_pb2
from hidream_grpc.model.checkpoint.demo import demo_checkpoint_path
from tests.support.checkpoints import write_variant
from tests.support.job_calls import Stub, bad_fields, events, get, listed, refusal, submission, submit_batch
from tests.support.live_server import running_server
from tests.support.streams import follow

MAX_STEPS = 10
MAX_QUEUED_JOBS = 2
CHEAP: dict[str, Any] = {"width": 64, "height": 64}


def open_request(request_id: str, **fields: Any) -> image_gen_pb2.SubmitJobRequest:
    """A request that leaves all to the server but for the prompt, and what is given."""
    return image_gen_pb2.SubmitJobRequest(
        spec=image_pb2.ImageSpec(prompt="a red circle", **fields),
        request_id=request_id,
        labels={"b": "", "a": "1"},
    )


BY_DEFAULTS = open_request("by-defaults")
TOO_MANY_STEPS = submission("too-many-steps", num_inference_steps=MAX_STEPS + 5)
TOO_LARGE = open_request("too-large", width=256, height=256, num_inference_steps=1)
NAMES_ITS_MODEL = image_gen_pb2.SubmitJobRequest(spec=TOO_MANY_STEPS.spec, request_id="named", model="Full")
BATCH = [submission(f"batch-{number}") for number in range(MAX_QUEUED_JOBS + 1)]
ATTACHED = image_gen_pb2.GenerateRequest(
    spec=image_pb2.ImageSpec(prompt="a red circle", **CHEAP), request_id="attached"
)
FROM_BEFORE = open_request("from-before", **CHEAP)
OLD_AND_TOO_MANY_STEPS = submission("from-before-too", num_inference_steps=MAX_STEPS + 5)
ONE_BY_ONE = (BY_DEFAULTS, TOO_MANY_STEPS, TOO_LARGE, NAMES_ITS_MODEL, FROM_BEFORE, OLD_AND_TOO_MANY_STEPS)


@dataclass(frozen=True)
class SecondLife:
    """A server of Dev with narrow limits, on the jobs that one of Full has drawn."""

    stub: Stub
    jobs: dict[str, job_pb2.Job]


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecondLife]:
    folder = tmp_path_factory.mktemp("retries")
    full = write_variant(demo_checkpoint_path(), folder / "Full", "full")
    (full / "generation_config.json").write_text(json.dumps({**CHEAP, "num_inference_steps": 2}))
    dev = write_variant(demo_checkpoint_path(), folder / "Dev", "dev")
    (dev / "generation_config.json").write_text(json.dumps({"width": 128, "height": 128}))
    transformer = json.loads((dev / "transformer" / "config.json").read_text())
    (dev / "transformer").unlink()
    (dev / "transformer").mkdir()
    for part in (full / "transformer").iterdir():
        (dev / "transformer" / part.name).symlink_to(part.resolve())
    (dev / "transformer" / "config.json").unlink()
    # 128×128 pixels are 64 tokens.
    (dev / "transformer" / "config.json").write_text(json.dumps({**transformer, "max_resolution": [16, 16]}))
    common = ("--data-dir", str(folder / "data"), "--devices", "0", "--threads-per-rank", "1")
    with running_server("--model-path", str(full), *common) as server, server.stub() as stub:
        first = [stub.SubmitJob(message) for message in ONE_BY_ONE]
        first += submit_batch(stub, *BATCH)
        follow(stub.Generate(ATTACHED))
        first += [stub.ListJobs(image_gen_pb2.ListJobsRequest(page_size=1)).jobs[0]]
        for job in first:
            assert events(stub, job.job_id)[-1].HasField("succeeded")
        jobs = {job.request_id: get(stub, job.job_id) for job in first}
    _forget_digests(folder / "data" / "jobs.sqlite", FROM_BEFORE, OLD_AND_TOO_MANY_STEPS)
    limits = (
        *("--max-num-inference-steps", str(MAX_STEPS)),
        *("--max-queued-jobs", str(MAX_QUEUED_JOBS)),
        *("--max-num-images", "1"),
    )
    with running_server("--model-path", str(dev), *common, *limits) as server, server.stub() as stub:
        yield SecondLife(stub, jobs)


def _forget_digests(path: Path, *requests: image_gen_pb2.SubmitJobRequest) -> None:
    """Make rows what a server wrote before there were digests of what callers send."""
    with sqlite3.connect(path) as database:
        for request in requests:
            changed = database.execute(
                "UPDATE jobs SET submission = json_remove(submission, '$.request_digest', '$.left_open') "
                "WHERE request_id = ? AND json_extract(submission, '$.request_digest') != ''",
                (request.request_id,),
            )
            assert changed.rowcount == 1
    database.close()


@pytest.mark.parametrize("message", ONE_BY_ONE, ids=lambda message: message.request_id)
def test_a_retry_follows_its_job_whatever_the_server_would_make_of_it_now(
    second: SecondLife, message: image_gen_pb2.SubmitJobRequest
) -> None:
    assert second.stub.SubmitJob(message) == second.jobs[message.request_id]
    again = image_gen_pb2.SubmitJobRequest.FromString(message.SerializeToString())
    assert submit_batch(second.stub, again) == [second.jobs[message.request_id]]


def test_generate_with_the_same_request_gives_the_same_images_under_other_limits(second: SecondLife) -> None:
    for message in (TOO_MANY_STEPS, TOO_LARGE):
        generate = image_gen_pb2.GenerateRequest(
            spec=message.spec, request_id=message.request_id, detached=True, labels=message.labels
        )
        assert follow(second.stub.Generate(generate)).job == second.jobs[message.request_id]
    assert follow(second.stub.Generate(ATTACHED)).job == second.jobs[ATTACHED.request_id]


def test_a_batch_that_is_longer_than_the_queue_now_holds_finds_its_jobs(second: SecondLife) -> None:
    assert submit_batch(second.stub, *BATCH) == [second.jobs[message.request_id] for message in BATCH]
    more = [*BATCH, submission("not-in-the-batch")]
    assert "max_queued_jobs" in bad_fields(lambda: submit_batch(second.stub, *more))["requests"]
    assert "not-in-the-batch" not in {get(second.stub, name).request_id for name in listed(second.stub)}


def _with(message: image_gen_pb2.SubmitJobRequest, **spec: Any) -> image_gen_pb2.SubmitJobRequest:
    changed = image_gen_pb2.SubmitJobRequest()
    changed.CopyFrom(message)
    changed.spec.MergeFrom(image_pb2.ImageSpec(**spec))
    return changed


@pytest.mark.parametrize(
    "other",
    [
        lambda: _with(BY_DEFAULTS, **CHEAP),
        lambda: _with(BY_DEFAULTS, prompt="a blue circle"),
        lambda: _with(FROM_BEFORE, prompt="a blue circle"),
        lambda: _with(FROM_BEFORE, num_inference_steps=3),
    ],
    ids=["spells the default", "other prompt", "other prompt, of before", "other steps, of before"],
)
def test_a_request_that_says_something_else_is_no_retry(
    second: SecondLife, other: Callable[[], image_gen_pb2.SubmitJobRequest]
) -> None:
    message = other()
    (resource,) = refusal(
        lambda: second.stub.SubmitJob(message),
        grpc.StatusCode.ALREADY_EXISTS,
        error_details_pb2.ResourceInfo(),
    )
    assert resource.resource_name == second.jobs[message.request_id].job_id


def test_what_the_limits_refuse_is_refused_unless_the_very_same_was_accepted(second: SecondLife) -> None:
    for message in (
        _with(TOO_MANY_STEPS, seed=5),
        image_gen_pb2.SubmitJobRequest(spec=TOO_MANY_STEPS.spec, request_id="a-new-one"),
        image_gen_pb2.SubmitJobRequest(spec=TOO_MANY_STEPS.spec),
    ):
        told = bad_fields(partial(second.stub.SubmitJob, message))
        assert str(MAX_STEPS) in told["spec.num_inference_steps"]
