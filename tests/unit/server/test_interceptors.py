from __future__ import annotations

import asyncio
from typing import Any

import grpc.aio
import pytest
from google.rpc import code_pb2

from hidream_grpc.errors import JobCancelledError, RankDiedError
from hidream_grpc.server.call import Call, begin_call
from hidream_grpc.server.interceptors import translated_errors


class AbortedContext:
    """A call's context that notes how the call was ended."""

    def __init__(self) -> None:
        self.code: int | None = None
        self.text = ""

    async def abort(self, code: grpc.StatusCode, text: str) -> None:
        self.code, self.text = code.value[0], text
        raise grpc.aio.AbortError

    async def abort_with_status(self, status: Any) -> None:
        await self.abort(status.code, status.details)


async def ended_by(error: BaseException) -> AbortedContext:
    begin_call(
        Call(method="/hidream.v1.ImageGen/WatchJob", peer="ipv4:127.0.0.1:1", deadline=None, request_id="r1")
    )
    context = AbortedContext()
    with pytest.raises(grpc.aio.AbortError):
        async with translated_errors(context):  # type: ignore[arg-type]
            raise error
    return context


async def test_an_error_of_ours_ends_the_call_with_its_own_status() -> None:
    context = await ended_by(JobCancelledError("j1"))
    assert (context.code, context.text) == (code_pb2.CANCELLED, "job j1 was cancelled")


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("secret of the server"),
        KeyError("secret of the server"),
        RankDiedError((1,), "secret of the server"),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_any_other_error_is_told_as_an_id_that_the_log_has_too(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    context = await ended_by(error)
    assert context.code == code_pb2.INTERNAL
    assert "secret" not in context.text
    (record,) = caplog.records
    assert getattr(record, "error_id", "") in context.text
    assert getattr(record, "request_id", "") == "r1"
    assert record.exc_info is not None
    assert record.exc_info[1] is error


@pytest.mark.parametrize("ending", [asyncio.CancelledError(), GeneratorExit()], ids=["cancelled", "closed"])
async def test_a_call_whose_caller_is_gone_is_left_alone(ending: BaseException) -> None:
    context = AbortedContext()
    with pytest.raises(type(ending)):
        async with translated_errors(context):  # type: ignore[arg-type]
            raise ending
    assert context.code is None
