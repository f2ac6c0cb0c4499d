"""The contract and the code say the same: limits, defaults, states."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from hidream.v1 import image_pb2, job_pb2, server_info_pb2
from hidream_grpc.engine.requests import Priority
from hidream_grpc.engine.step_order import MAX_TURNS_DEFERRED, MAX_TURNS_WAITED
from hidream_grpc.jobs.job import CancelReason, JobStage, JobState
from hidream_grpc.jobs.limits import RequestDefaults, RequestLimits
from hidream_grpc.jobs.store.order import TURNS_PER_OLDEST
from hidream_grpc.model.parameters import GenerationParameters, OutputFormat

PROTOS = Path(__file__).parents[3] / "protos" / "hidream" / "v1"


def fields_of(value_type: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(value_type)]


@pytest.mark.parametrize(
    ("message", "value_type"),
    [
        (server_info_pb2.RequestLimits, RequestLimits),
        (server_info_pb2.RequestDefaults, RequestDefaults),
    ],
    ids=["limits", "defaults"],
)
def test_server_info_shows_every_limit_and_default_that_the_validator_reads(
    message: Any, value_type: Any
) -> None:
    assert {field.name for field in message.DESCRIPTOR.fields} == set(fields_of(value_type))


def test_every_limit_and_default_that_a_comment_of_the_contract_names_exists() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in PROTOS.glob("*.proto"))
    limits = set(re.findall(r"\blimits\.(\w+)", text))
    assert limits
    assert limits <= set(fields_of(RequestLimits))
    defaults = set(re.findall(r"\bdefaults\.(\w+)", text))
    assert defaults
    assert defaults <= set(fields_of(RequestDefaults))


def test_the_constants_in_the_comments_of_the_contract_are_those_of_the_code() -> None:
    text = re.sub(r"\s*//\s*", " ", (PROTOS / "image.proto").read_text(encoding="utf-8"))
    quality = re.search(r"`limits\.max_quality` \((\d+) to (\d+)\); .*? Absent: (\d+)\.", text)
    assert quality is not None
    default = {field.name: field.default for field in dataclasses.fields(RequestDefaults)}
    limit = {field.name: field.default for field in dataclasses.fields(RequestLimits)}
    expected = [limit["min_quality"], limit["max_quality"], default["quality"]]
    assert [int(number) for number in quality.groups()] == expected
    assert re.search(rf"limits\.max_num_images`\. Absent: {default['num_images']}\.", text)


@pytest.mark.parametrize(
    ("enum", "prefix", "names"),
    [
        (job_pb2.JobState, "JOB_STATE_", [state.value for state in JobState]),
        (job_pb2.JobStage, "JOB_STAGE_", [stage.value for stage in JobStage]),
        (job_pb2.Priority, "PRIORITY_", [priority.name for priority in Priority]),
        (job_pb2.CancelReason, "CANCEL_REASON_", [reason.value for reason in CancelReason]),
        (image_pb2.OutputFormat, "OUTPUT_FORMAT_", [value.value for value in OutputFormat]),
    ],
    ids=["JobState", "JobStage", "Priority", "CancelReason", "OutputFormat"],
)
def test_states_and_choices_have_the_names_of_the_contract(enum: Any, prefix: str, names: list[str]) -> None:
    assert enum.keys() == [f"{prefix}{name}" for name in ("UNSPECIFIED", *names)]


def test_an_image_spec_holds_every_parameter_of_the_model_but_previews_and_what_follows() -> None:
    spec = {field.name for field in image_pb2.ImageSpec.DESCRIPTOR.fields}
    assert spec == set(GenerationParameters.__struct_fields__) - {"with_previews", "prompt_tokens"}


def test_the_contract_says_how_many_later_jobs_start_before_an_older_one() -> None:
    comment = (PROTOS / "job.proto").read_text().split("enum Priority")[0].rpartition("\n}")[2]
    assert f"Every {TURNS_PER_OLDEST}th job" in comment
    assert f"at most {TURNS_PER_OLDEST} later jobs" in comment
    assert f"for {MAX_TURNS_WAITED} or more" in comment
    assert (
        f"any {MAX_TURNS_WAITED + 1} × (n + 1) steps, and in any {MAX_TURNS_DEFERRED + 1} × (n + 1)"
        in comment
    )
