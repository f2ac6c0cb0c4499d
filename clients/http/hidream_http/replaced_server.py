"""The routes of the REST server that hidream-grpc replaces, with its fields and its words.

Nothing is kept here: a task is a job of the server, and each answer is made of the job as it is then.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from hidream.errors import InvalidArgumentError, ServerError
from hidream.requests import with_request_id
from hidream.v1 import image_gen_pb2, job_pb2, server_info_pb2
from hidream_http import __version__
from hidream_http.bridge import Bridge
from hidream_http.image_files import (
    PATH,
    ROUTE_NAME,
    file_name_of,
    image_file_response,
    image_url,
    job_of,
)
from hidream_http.problems import ProblemError, problem_of
from hidream_http.replaced_bodies import (
    BatchBody,
    DownloadQuery,
    InvalidBodyError,
    NoQuery,
    SubmitBody,
    place_of,
    read_body,
    read_query,
    submitted,
    task,
)

_Handler = Callable[[Request], Awaitable[Response]]

# States in which requests are taken; while ranks are replaced they wait.
_READY = (server_info_pb2.SERVER_STATE_SERVING, server_info_pb2.SERVER_STATE_RECOVERING)


def routes(bridge: Bridge) -> list[BaseRoute]:
    """The routes of the replaced server."""
    tasks = _Tasks(bridge)
    return [
        Route("/", _answering(_describe)),
        Route("/health", _answering(tasks.health)),
        Route("/submit", _answering(tasks.submit), methods=["POST"]),
        Route("/batch_submit", _answering(tasks.batch_submit), methods=["POST"]),
        Route("/status/{task_id}", _answering(tasks.status)),
        Route("/download/{task_id}", _answering(tasks.download)),
        Route(PATH, _answering(tasks.image_file), name=ROUTE_NAME),
    ]


async def _describe(_: Request) -> Response:
    description = {"message": "HiDream-I1 image generation", "status": "running", "version": __version__}
    return JSONResponse(description)


class _Tasks:
    """The handlers that call the server."""

    def __init__(self, bridge: Bridge) -> None:
        self._bridge = bridge

    async def health(self, request: Request) -> Response:
        """Say whether the server takes requests, and how many there are."""
        read_query(request, NoQuery)
        caller = self._bridge.caller(request)
        message = image_gen_pb2.GetServerInfoRequest()
        info = await caller.answer(self._bridge.stub.GetServerInfo, message)
        is_ready = info.state in _READY
        state = server_info_pb2.ServerState.Name(info.state).removeprefix("SERVER_STATE_").lower()
        return JSONResponse(
            {
                "status": "healthy" if is_ready else state,
                "pipeline_ready": is_ready,
                "queue_length": info.jobs.queued,
                "active_tasks": info.jobs.running,
                "total_tasks": info.jobs.total,
            }
        )

    async def submit(self, request: Request) -> Response:
        """Queue one task."""
        body = await read_body(request, SubmitBody)
        message = with_request_id(body.message())
        job = await self._bridge.caller(request).answer(self._bridge.stub.SubmitJob, message)
        return JSONResponse(submitted(job))

    async def batch_submit(self, request: Request) -> Response:
        """Queue many tasks: all of them, or none."""
        body = await read_body(request, BatchBody)
        caller = self._bridge.caller(request)
        answer = await caller.answer(self._bridge.stub.BatchSubmitJobs, body.message())
        return JSONResponse([submitted(job) for job in answer.jobs])

    async def status(self, request: Request) -> Response:
        """Describe a task as it is now."""
        read_query(request, NoQuery)
        job = await job_of(self._bridge, request, request.path_params["task_id"])
        result_urls = [image_url(request, job.job_id, image) for image in job.images]
        return JSONResponse(task(job, result_urls))

    async def download(self, request: Request) -> Response:
        """Send one image of a completed task, to be saved as a file."""
        index = read_query(request, DownloadQuery).image_index
        job = await job_of(self._bridge, request, request.path_params["task_id"])
        if job.state != job_pb2.JOB_STATE_SUCCEEDED:
            raise HTTPException(400, "Task not completed")
        if index >= len(job.images):
            raise HTTPException(404, "Image not found")
        response = await image_file_response(self._bridge, request, job.job_id, index)
        file_name = f"{job.job_id}_image_{file_name_of(job.images[index])}"
        response.headers["Content-Disposition"] = f'attachment; filename="{file_name}"'
        return response

    async def image_file(self, request: Request) -> Response:
        """Send an image under the address that its task tells."""
        read_query(request, NoQuery)
        job = await job_of(self._bridge, request, request.path_params["job_id"])
        for image in job.images:
            if file_name_of(image) == request.path_params["file_name"]:
                return await image_file_response(self._bridge, request, job.job_id, image.index)
        raise HTTPException(404, "Image not found")


def _answering(handler: _Handler) -> _Handler:
    """Have a handler's errors answered in the shape of the replaced server, which was FastAPI's."""

    async def answer(request: Request) -> Response:
        try:
            return await handler(request)
        except InvalidBodyError as error:
            return JSONResponse({"detail": error.errors}, 422)
        except InvalidArgumentError as error:
            return JSONResponse({"detail": _errors_of(error)}, 422)
        except (ServerError, ProblemError, HTTPException) as error:
            problem = problem_of(error)
            return JSONResponse({"detail": problem.detail}, problem.status, problem.response_headers())

    return answer


def _errors_of(error: InvalidArgumentError) -> list[dict[str, Any]]:
    # Width and height are one field here, and may both be wrong in the same way.
    places_and_texts = [(place_of(one.field), one.description) for one in error.violations]
    unique = [one for index, one in enumerate(places_and_texts) if one not in places_and_texts[:index]]
    return [{"loc": place, "msg": text, "type": "value_error"} for place, text in unique]
