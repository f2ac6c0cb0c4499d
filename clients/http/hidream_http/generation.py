"""One call of `Generate` that outlives the connection to the server, on behalf of a caller that may leave."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from dataclasses import replace

from hidream.errors import ServerError
from hidream.events import Event
from hidream.reconnecting import ReconnectPolicy
from hidream.v1 import image_gen_pb2
from hidream.watching import JobGeneration
from hidream_http.bridge import Caller

LEAVE_TIMEOUT_SECONDS = 5.0


async def generation_events(caller: Caller, request: image_gen_pb2.GenerateRequest) -> AsyncGenerator[Event]:
    """What happens to the job of a request; leaving the generator stops the job.

    When the connection is lost, or the server restarts, the call goes on with the same job, as that of
    `hidream.aio` does.

    Raises:
        ServerError: the request was refused, the job failed, or no server answered for too long.
        StreamError: the images did not arrive as they were sent.
    """
    stream = JobGeneration(request, ReconnectPolicy(timeout_seconds=caller.timeout_seconds))
    method = caller.bridge.stub.Generate
    try:
        while not stream.is_over:
            rest = replace(caller, timeout_seconds=stream.timeout_seconds())
            try:
                async with aclosing(rest.stream(method, stream.request())) as responses:
                    async for response in responses:
                        stream.answered()
                        if (event := stream.read(response)) is not None:
                            yield event
                stream.ended()
            except ServerError as error:
                await asyncio.sleep(stream.retry_delay_seconds(error))
    except ServerError:
        raise
    except BaseException:
        await _stop(caller, stream.held_job_id)
        raise


async def _stop(caller: Caller, job_id: str) -> None:
    """Cancel a job that the server would hold for a caller whose connection is lost."""
    if not job_id:
        return
    leaving = replace(caller, timeout_seconds=LEAVE_TIMEOUT_SECONDS)
    # A server that does not answer stops it itself, a little later.
    with suppress(ServerError):
        await leaving.answer(caller.bridge.stub.CancelJob, image_gen_pb2.CancelJobRequest(job_id=job_id))
