"""Wraps what serves a method, whatever its shape, in an async context manager."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, aclosing
from typing import Any, TypeAlias

import grpc
import grpc.aio

# Text: only the stubs know these classes as generic.
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Around = Callable[[Context], AbstractAsyncContextManager[None]]
Continuation = Callable[[grpc.HandlerCallDetails], Awaitable["Handler | None"]]

OUR_METHODS = "/hidream.v1.ImageGen/"


def wrap_handler(handler: Handler, around: Around) -> Handler:
    """The same handler, run inside `around(context)`. Requests are unary in all of our methods."""
    inner: Any = handler.unary_stream if handler.response_streaming else handler.unary_unary
    if handler.response_streaming:

        async def stream(request: Any, context: Context) -> AsyncIterator[Any]:
            async with around(context), aclosing(inner(request, context)) as responses:
                async for response in responses:
                    yield response

        return grpc.unary_stream_rpc_method_handler(
            stream, handler.request_deserializer, handler.response_serializer
        )

    async def unary(request: Any, context: Context) -> Any:
        async with around(context):
            response = inner(request, context)
            return await response if inspect.isawaitable(response) else response

    return grpc.unary_unary_rpc_method_handler(
        unary, handler.request_deserializer, handler.response_serializer
    )
