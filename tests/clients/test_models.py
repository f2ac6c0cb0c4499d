"""Which model is to draw, from the `hidream` command to the request."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from grpc_status import rpc_status
from typer.testing import CliRunner, Result

from hidream.commands import app
from hidream.v1 import image_gen_pb2, job_pb2
from hidream_grpc.errors import ModelNotServedError
from hidream_grpc.server.status import to_status
from tests.clients.breaking_server import JOB_ID, BreakingImageGen, serving

LIVE_MODELS = ("dev", "full")


@dataclass
class ChoosingImageGen(BreakingImageGen):
    """Notes the model of each request, None for none, and draws with those that live."""

    models: list[str | None] = field(default_factory=list)

    def Generate(self, request: image_gen_pb2.GenerateRequest, context: Any) -> Iterator[Any]:  # noqa: N802
        self._accept(request, context)
        return super().Generate(request, context)

    def SubmitJob(self, request: image_gen_pb2.SubmitJobRequest, context: Any) -> job_pb2.Job:  # noqa: N802
        self._accept(request, context)
        return self.job

    def BatchSubmitJobs(  # noqa: N802
        self, request: image_gen_pb2.BatchSubmitJobsRequest, context: Any
    ) -> image_gen_pb2.BatchSubmitJobsResponse:
        for one in request.requests:
            self._accept(one, context)
        return image_gen_pb2.BatchSubmitJobsResponse(jobs=[self.job for _ in request.requests])

    def _accept(
        self, request: image_gen_pb2.GenerateRequest | image_gen_pb2.SubmitJobRequest, context: Any
    ) -> None:
        self.models.append(request.model if request.HasField("model") else None)
        if request.HasField("model") and request.model not in LIVE_MODELS:
            error = ModelNotServedError(request.model, LIVE_MODELS)
            context.abort_with_status(rpc_status.to_status(to_status(error)))


@pytest.fixture
def server() -> Iterator[tuple[ChoosingImageGen, str]]:
    servicer = ChoosingImageGen()  # type: ignore[abstract]
    with serving(servicer) as address:
        yield servicer, address


def run(address: str, *arguments: str, lines: str = "") -> Result:
    return CliRunner().invoke(app, [*arguments, "--address", address], input=lines)


@pytest.mark.parametrize("model", [None, "dev"])
def test_generate_and_submit_name_the_model_only_when_it_is_given(
    model: str | None, server: tuple[ChoosingImageGen, str], tmp_path: Path
) -> None:
    option = () if model is None else ("--model", model)
    out = str(tmp_path / "a.png")
    assert run(server[1], "generate", "a fox", "--quiet", "--out", out, *option).stdout == f"{out}\n"
    assert run(server[1], "submit", "a fox", *option).stdout == f"{JOB_ID}\n"
    assert server[0].models == [model, model]


def test_the_model_of_a_batch_is_for_the_lines_that_name_none(server: tuple[ChoosingImageGen, str]) -> None:
    lines = '{"prompt": "a"}\n{"prompt": "b", "model": "full"}\n'
    assert run(server[1], "batch", lines=lines).exit_code == 0
    assert run(server[1], "batch", "--model", "dev", lines=lines).exit_code == 0
    assert server[0].models == [None, "full", "dev", "full"]


def test_a_model_that_no_server_has_is_one_line_with_those_that_live(
    server: tuple[ChoosingImageGen, str],
) -> None:
    result = run(server[1], "submit", "a fox", "--model", "fast")
    assert result.exit_code == 1
    assert result.stderr == (
        f"hidream: {server[1]}: no live server serves the model 'fast'; live models: dev, full\n"
    )
