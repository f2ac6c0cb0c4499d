"""Parses a call's message where everything that can be wrong with it is translated."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from hidream_grpc.errors import FieldViolation, InvalidRequestError
from hidream_grpc.server.interceptors.handlers import OUR_METHODS, Context, Continuation, Handler


class ParsingInterceptor(grpc.aio.ServerInterceptor):
    """Innermost: a message that does not parse is INVALID_ARGUMENT (grpc alone would answer INTERNAL).

    The handler is given the bytes, and parses them once the caller is known.
    """

    async def intercept_service(
        self, continuation: Continuation, details: grpc.HandlerCallDetails
    ) -> Handler | None:
        """Wrap our own methods only."""
        handler = await continuation(details)
        if handler is None or not details.method.startswith(OUR_METHODS):
            return handler
        return _parsing_inside(handler)


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
