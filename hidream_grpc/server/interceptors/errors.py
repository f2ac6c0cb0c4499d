"""Turns errors into statuses. A caller never sees an exception's text that we did not write for it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from grpc_status import rpc_status

from hidream_grpc.errors import FieldViolation, HiDreamError, InvalidRequestError, JobInternalError
from hidream_grpc.server.call import current_call
from hidream_grpc.server.interceptors.handlers import (
    OUR_METHODS,
    Context,
    Continuation,
    Handler,
    wrap_handler,
)
from hidream_grpc.server.status import TABLE, to_status

logger = logging.getLogger(__name__)


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Ends a call with the status of the error that its handler raised.

    A message that does not parse is INVALID_ARGUMENT (grpc alone would answer INTERNAL), so the
    handler is given the bytes and parses them inside.
    """

    async def intercept_service(
        self, continuation: Continuation, details: grpc.HandlerCallDetails
    ) -> Handler | None:
        """Wrap our own methods only; health and reflection speak for themselves."""
        handler = await continuation(details)
        if handler is None or not details.method.startswith(OUR_METHODS):
            return handler
        return wrap_handler(_parsing_inside(handler), translated_errors)


def _parsing_inside(handler: Handler) -> Handler:
    parse: Any = handler.request_deserializer

    def parsed(request: bytes) -> Any:
        try:
            return parse(request)
        except DecodeError:
            description = "the message does not parse: wrong wire format, or a string that is not UTF-8"
            raise InvalidRequestError((FieldViolation("", description),)) from None

    if handler.response_streaming:
        stream: Any = handler.unary_stream

        async def unary_stream(request: bytes, context: Context) -> AsyncIterator[Any]:
            async with aclosing(stream(parsed(request), context)) as responses:
                async for response in responses:
                    yield response

        return grpc.unary_stream_rpc_method_handler(unary_stream, None, handler.response_serializer)
    unary: Any = handler.unary_unary
    return grpc.unary_unary_rpc_method_handler(
        lambda request, context: unary(parsed(request), context), None, handler.response_serializer
    )


@asynccontextmanager
async def translated_errors(context: Context) -> AsyncIterator[None]:
    """Abort the call with the status of whatever is raised inside."""
    try:
        yield
    except (asyncio.CancelledError, GeneratorExit, grpc.aio.AbortError):
        raise
    except NotImplementedError:
        method = current_call().method.rpartition("/")[2]
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, f"this server does not have {method} yet")
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
