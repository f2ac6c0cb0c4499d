"""Turns errors into statuses. A caller never sees an exception's text that we did not write for it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import grpc.aio
from grpc_status import rpc_status

from hidream_grpc.errors import HiDreamError, JobInternalError
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
    """Ends a call with the status of the error that was raised inside."""

    async def intercept_service(
        self, continuation: Continuation, details: grpc.HandlerCallDetails
    ) -> Handler | None:
        """Wrap our own methods only; health and reflection speak for themselves."""
        handler = await continuation(details)
        if handler is None or not details.method.startswith(OUR_METHODS):
            return handler
        return wrap_handler(handler, translated_errors)


@asynccontextmanager
async def translated_errors(context: Context) -> AsyncIterator[None]:
    """Abort the call with the status of whatever is raised inside."""
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
