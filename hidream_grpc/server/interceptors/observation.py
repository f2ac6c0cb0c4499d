"""One log line and two measurements for every call."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import grpc.aio

from hidream_grpc.server.call import Call, begin_call
from hidream_grpc.server.interceptors.handlers import (
    OUR_METHODS,
    Context,
    Continuation,
    Handler,
    wrap_handler,
)
from hidream_grpc.server.metrics import Metrics

logger = logging.getLogger("hidream_grpc.access")


class ObservationInterceptor(grpc.aio.ServerInterceptor):
    """Outermost: sees how each of our calls ends."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    async def intercept_service(
        self, continuation: Continuation, details: grpc.HandlerCallDetails
    ) -> Handler | None:
        """Wrap our own methods only."""
        handler = await continuation(details)
        method = details.method
        if handler is None or not method.startswith(OUR_METHODS):
            return handler

        @asynccontextmanager
        async def observed(context: Context) -> AsyncIterator[None]:
            start = time.monotonic()
            remaining_seconds = context.time_remaining()
            deadline = None if remaining_seconds is None else start + remaining_seconds
            call = Call(method, context.peer(), deadline)
            begin_call(call)
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
                self._report(call, code, time.monotonic() - start)

        return wrap_handler(handler, observed)

    def _report(self, call: Call, code: grpc.StatusCode, call_seconds: float) -> None:
        method = call.method.removeprefix(OUR_METHODS)
        self._metrics.observe_call(method, code.name, call_seconds)
        logger.info(
            "%s %s",
            method,
            code.name,
            extra={
                "peer": call.peer,
                "caller": call.caller,
                "request_id": call.request_id,
                "job_id": call.job_id,
                "call_seconds": round(call_seconds, 3),
            },
        )


def _as_enum(code: object) -> grpc.StatusCode:
    """The code that a call was aborted with; aio gives it as a number or as the enum."""
    return next(known for known in grpc.StatusCode if code in (known, known.value[0]))
