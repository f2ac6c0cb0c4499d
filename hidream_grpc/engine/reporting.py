"""From the answers of the ranks to the events of each request. A request that ends is deleted."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hidream_grpc.engine.protocol.messages import JobFault, PlanDone, StepPlan
from hidream_grpc.engine.requests import (
    ImageFinished,
    PreviewMade,
    PromptReport,
    PromptsEncoded,
    RequestFailed,
    RequestFinished,
    StepFinished,
    StepReport,
)
from hidream_grpc.engine.running_request import RunningRequest, Snapshot
from hidream_grpc.engine.scheduler import note_forward
from hidream_grpc.engine.snapshot_schedule import SnapshotBudget, snapshot_cost_seconds
from hidream_grpc.errors import (
    JobError,
    JobInternalError,
    NonFiniteError,
    OutOfDeviceMemoryError,
    SnapshotError,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Faults:
    """The requests that failed in a round while the group is whole.

    Attributes:
        claim_ids: claims of all of them.
        out_of_memory: claims for which a device had no room.
        refused_snapshots: claim to the reason why its snapshot cannot be used.
        fatal: faults that end their requests.
    """

    claim_ids: frozenset[str]
    out_of_memory: frozenset[str]
    refused_snapshots: Mapping[str, str]
    fatal: tuple[JobFault, ...]

    @classmethod
    def of(cls, answers: Sequence[PlanDone]) -> Faults:
        """The faults in the answers; one of each request, whichever rank reports it."""
        faults = {fault.claim_id: fault for answer in answers for fault in answer.faults}
        out_of_memory = {c for c, fault in faults.items() if fault.kind == OutOfDeviceMemoryError.__name__}
        refused = {c: fault.reason for c, fault in faults.items() if fault.kind == SnapshotError.__name__}
        fatal = tuple(fault for c, fault in faults.items() if c not in out_of_memory | refused.keys())
        return cls(frozenset(faults), frozenset(out_of_memory), refused, fatal)


def report_prompts(
    running: Mapping[str, RunningRequest], plan: StepPlan, answers: Sequence[PlanDone]
) -> PromptReport:
    """Report to the requests that have started that their prompts are encoded."""
    rank_seconds = tuple(answer.encode_seconds for answer in answers)
    for admission in plan.admissions:
        if request := running.get(admission.claim_id):
            request.publish(PromptsEncoded(max(rank_seconds), rank_seconds))
    # Every rank counts the same prompts.
    return PromptReport(answers[0].num_prompt_cache_hits, answers[0].num_prompt_cache_misses)


def report_step(
    running: Mapping[str, RunningRequest],
    stepped: Sequence[str],
    answers: Sequence[PlanDone],
    snapshot_budget: SnapshotBudget,
    round_seconds: float | None,
) -> StepReport | None:
    """Record a step, and report it to the requests that have taken it, with its previews and its snapshot.

    Returns:
        The step of all of them; None where all have left.
    """
    rank_seconds = tuple(answer.step_seconds for answer in answers)
    step_seconds = max(rank_seconds)
    previews = {preview.claim_id: preview.data for answer in answers for preview in answer.previews}
    note_forward(running, stepped, step_seconds)
    snapshot_budget.earn(step_seconds)
    requests = [running[claim_id] for claim_id in stepped]
    for request in requests:
        request.publish(StepFinished(request.step, step_seconds, rank_seconds))
        if request.request.claim_id in previews:
            request.publish(PreviewMade(request.step, previews[request.request.claim_id]))
    if not requests:
        return None
    size = requests[0].size
    return StepReport(
        step_seconds=step_seconds,
        width=size.width,
        height=size.height,
        prompt_tokens=size.prompt_tokens,
        num_samples=sum(request.request.parameters.num_samples for request in requests),
        snapshot_seconds=_report_snapshots(running, answers, snapshot_budget),
        round_seconds=round_seconds,
    )


def _report_snapshots(
    running: Mapping[str, RunningRequest], answers: Sequence[PlanDone], budget: SnapshotBudget
) -> float:
    """Keep the snapshots that came with a step; returns what they cost, in seconds."""
    total_seconds = 0.0
    for snapshot in filter(None, (answer.snapshot for answer in answers)):
        if request := running.get(snapshot.claim_id):
            request.hand_up(Snapshot(snapshot.step, snapshot.data))
            cost_seconds = snapshot_cost_seconds(snapshot.snapshot_seconds, len(snapshot.data))
            budget.spend(cost_seconds)
            total_seconds += cost_seconds
    return total_seconds


def report_images(running: dict[str, RunningRequest], answers: Sequence[PlanDone]) -> None:
    """Report images that are finished, and then the end of requests that have all of theirs."""
    for rank, image in ((rank, image) for rank, answer in enumerate(answers) for image in answer.images):
        if request := running.get(image.claim_id):
            request.finish_image(image.image_index)
            request.publish(ImageFinished(image.image_index, image.data, image.decode_seconds, rank))
            if request.is_finished:
                del running[image.claim_id]
                request.publish(RequestFinished())


def fail(running: dict[str, RunningRequest], claim_id: str, error: JobError) -> None:
    """Delete a request and report why it has failed; nothing happens where it has left."""
    if request := running.pop(claim_id, None):
        request.publish(RequestFailed(error))


def fail_for(running: dict[str, RunningRequest], fault: JobFault) -> None:
    """Fail a request for a fault of its own; log it where the ranks have not."""
    error = JobInternalError(fault.error_id) if fault.error_id else JobInternalError.new()
    request = running.get(fault.claim_id)
    if request is not None and fault.kind == NonFiniteError.__name__:
        extra = request.log_fields | {"error_id": error.error_id}
        logger.error("job failed: %s", fault.reason, extra=extra)
    fail(running, fault.claim_id, error)
