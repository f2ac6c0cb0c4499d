"""What happens around every call of ours, in this order: observe, translate, identify, parse.

Calls of health and reflection pass unchanged: they need no token and are not observed.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from typing import Any, TypeAlias

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from grpc_status import rpc_status

from hidream_grpc.errors import (
    FieldViolation,
    HiDreamError,
    InvalidRequestError,
    JobInternalError,
)
from hidream_grpc.server.call import Call, begin_call, current_call
from hidream_grpc.server.callers import CallerIdentification
from hidream_grpc.server.metrics import Metrics
from hidream_grpc.server.status import TABLE, to_status
from hidream_grpc.server.tracing import CallSpan, Tracing
from hidream_grpc.traces import enter_trace

logger = logging.getLogger(__name__)
access_logger = logging.getLogger("hidream_grpc.access")

OUR_METHODS = "/hidream.v1.ImageGen/"
# Text: only the stubs know these classes as generic.
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Serves each call of ours inside the chain of this file.

    It is one interceptor for all links: each one more costs every streamed message a generator.
    """

    def __init__(
        self, metrics: Metrics, callers: CallerIdentification, tracing: Tracing | None = None
    ) -> None:
        self._metrics = metrics
        self._callers = callers
        self._tracing = tracing

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Wrap what serves one of our methods; in all of them the request is one message."""
        handler = await continuation(details)
        method = details.method
        if handler is None or not method.startswith(OUR_METHODS):
            return handler
        parse: Any = handler.request_deserializer
        serve: Any = handler.unary_stream if handler.response_streaming else handler.unary_unary

        async def stream(request: bytes, context: Context) -> AsyncIterator[Any]:
            async with (
                self._around(method, context),
                aclosing(serve(parsed(parse, request), context)) as responses,
            ):
                async for response in responses:
                    yield response

        async def unary(request: bytes, context: Context) -> Any:
            async with self._around(method, context):
                return await serve(parsed(parse, request), context)

        # Without a deserializer the handler is given the bytes, to parse them once the caller is known.
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(stream, None, handler.response_serializer)
        return grpc.unary_unary_rpc_method_handler(unary, None, handler.response_serializer)

    @asynccontextmanager
    async def _around(self, method: str, context: Context) -> AsyncIterator[None]:
        with observed(self._metrics, self._tracing, method, context):
            async with translated_errors(context):
                metadata = context.invocation_metadata() or ()
                self._callers.identify(current_call(), metadata, context.auth_context)
                yield


# --- observe: one log line, two measurements and a span for every call -----------------------------


@contextmanager
def observed(metrics: Metrics, tracing: Tracing | None, method: str, context: Context) -> Iterator[None]:
    """Make this the current call, and report how it ends."""
    start = time.monotonic()
    remaining_seconds = context.time_remaining()
    deadline = None if remaining_seconds is None else start + remaining_seconds
    call = Call(method, context.peer(), deadline)
    begin_call(call)
    span = None
    if tracing is not None:
        span = tracing.begin_call(method, call.peer, context.invocation_metadata() or ())
    if span is not None:
        enter_trace(span.context)
    code = grpc.StatusCode.UNKNOWN
    try:
        yield
        code = grpc.StatusCode.OK
    except grpc.aio.AbortError:
        code = _as_enum(context.code())
        raise
    except (asyncio.CancelledError, GeneratorExit):
        is_late = call.deadline_has_passed
        code = grpc.StatusCode.DEADLINE_EXCEEDED if is_late else grpc.StatusCode.CANCELLED
        raise
    finally:
        _report(metrics, call, span, code, time.monotonic() - start)


def _report(
    metrics: Metrics, call: Call, span: CallSpan | None, code: grpc.StatusCode, call_seconds: float
) -> None:
    method = call.method.removeprefix(OUR_METHODS)
    metrics.observe_call(method, code.name, call_seconds)
    access_logger.info(
        "%s %s",
        method,
        code.name,
        extra={
            "method": method,
            "code": code.name,
            "peer": call.peer,
            "caller": call.caller,
            "request_id": call.request_id,
            "job_id": call.job_id,
            "call_seconds": round(call_seconds, 3),
        },
    )
    if span is not None:
        span.end(call, code)


def _as_enum(code: object) -> grpc.StatusCode:
    """The code that a call was aborted with; aio gives it as a number or as the enum."""
    return next(known for known in grpc.StatusCode if code in (known, known.value[0]))


# --- translate: a caller never sees the text of an exception that was not written for it -----------


@asynccontextmanager
async def translated_errors(context: Context) -> AsyncIterator[None]:
    """Abort the call with the status of the error that is raised inside."""
    try:
        yield
    except (asyncio.CancelledError, GeneratorExit, grpc.aio.AbortError):
        raise
    except HiDreamError as error:
        known = error if type(error) in TABLE else _unexpected(error)
        await context.abort_with_status(rpc_status.to_status(to_status(known)))
    except Exception as error:
        await context.abort_with_status(rpc_status.to_status(to_status(_unexpected(error))))


def _unexpected(error: Exception) -> JobInternalError:
    hidden = JobInternalError.new()
    call = current_call()
    logger.error(
        "%s failed: %s",
        call.method,
        type(error).__name__,
        exc_info=error,
        extra={"error_id": hidden.error_id, "request_id": call.request_id, "job_id": call.job_id},
    )
    return hidden


# --- parse ----------------------------------------------------------------------------------------


def parsed(parse: Callable[[bytes], Any], request: bytes) -> Any:
    """The message of a call.

    Raises:
        InvalidRequestError: it does not parse (grpc alone would answer INTERNAL).
    """
    try:
        return parse(request)
    except DecodeError:
        description = "the message does not parse: wrong wire format, or a string that is not UTF-8"
        raise InvalidRequestError((FieldViolation("", description),)) from None
