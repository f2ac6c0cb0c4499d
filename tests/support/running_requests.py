"""Records of running requests, as the engine's policies see them."""

from __future__ import annotations

from hidream_grpc.engine.requests import EngineRequest, Priority
from hidream_grpc.engine.running_request import RunningRequest
from hidream_grpc.model.parameters import GenerationParameters

PARAMETERS = GenerationParameters(
    prompt="", width=64, height=64, num_inference_steps=9, guidance_scale=1.0, seed=0
)


def running_request(
    claim_id: str,
    parameters: GenerationParameters = PARAMETERS,
    step: int = 0,
    finished_images: frozenset[int] = frozenset(),
    caller: str = "",
    priority: Priority = Priority.NORMAL,
    deadline: float | None = None,
) -> RunningRequest:
    """A request that has taken some steps and decoded some images."""
    request = EngineRequest(
        claim_id=claim_id,
        job_id=f"job of {claim_id}",
        request_id=f"request of {claim_id}",
        parameters=parameters,
        on_event=lambda _event: None,
        finished_images=finished_images,
        caller=caller,
        priority=priority,
        deadline=deadline,
    )
    return RunningRequest(request, step=step)


def running_requests(*claim_ids: str) -> dict[str, RunningRequest]:
    """Requests that have just started, by their claims."""
    return {claim_id: running_request(claim_id) for claim_id in claim_ids}
