"""What becomes spans of a job, from what the engine reports of it."""

from __future__ import annotations

from dataclasses import replace

from hidream_grpc.engine.requests import PromptsEncoded, RequestRestarted, RequestStarted, StepFinished
from hidream_grpc.errors import JobInternalError
from hidream_grpc.jobs.execution.job_spans import JobSpans, StageSpans
from hidream_grpc.jobs.job import Execution, Job, JobState, StoredSnapshot
from hidream_grpc.traces import FinishedSpan, TraceContext
from tests.support.job_stores import new_job

CALL = TraceContext("0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331", trace_state="vendor=1")
EXECUTION = Execution("demo", "FlowMatchLCMScheduler", 3.0, "tp=1")


def accepted(trace: TraceContext | None) -> Job:
    return replace(new_job(), trace=trace, create_time=100.0, claim_number=1)


def traced() -> tuple[StageSpans, Job, list[FinishedSpan]]:
    """The spans of a job of four steps that starts at 101."""
    job, spans = accepted(CALL.child()), list[FinishedSpan]()
    stages = StageSpans(job, spans.append)
    job = job.started(EXECUTION, 101.0)
    stages.observe(RequestStarted(), job, 101.0, 101.0)
    return stages, job, spans


def test_ranks_that_are_lost_end_the_steps_with_the_reason_and_the_next_attempt_has_its_own() -> None:
    stages, job, spans = traced()
    stages.observe(PromptsEncoded(0.5, (0.4, 0.5)), job, 103.0, 103.0)
    stages.observe(StepFinished(1, 1.0, (0.9, 1.0)), job, 103.0, 103.0)
    stages.observe(StepFinished(2, 1.0, (0.8, 1.0)), job, 104.0, 104.0)
    restarted = replace(job, execution=replace(EXECUTION, attempt=2))
    stages.observe(RequestRestarted(2, "rank 1 died", 2), restarted, 110.0, 110.0)
    for step in (3, 4):
        stages.observe(StepFinished(step, 1.0, (1.0,)), restarted, 108.0 + step, 108.0 + step)
    assert [span.name for span in spans] == [
        *("queue", "encode", "denoise on rank", "denoise on rank", "denoise"),
        *("denoise on rank", "denoise"),
    ]
    first, second = (span for span in spans if span.name == "denoise")
    assert (first.start_time, first.end_time, first.error) == (102.0, 104.0, "rank 1 died")
    assert (second.start_time, second.end_time, second.error) == (110.0, 112.0, None)
    assert [event.attributes["hidream.step"] for event in second.events] == [3, 4]
    assert second.attributes["hidream.attempt"] == 2
    assert second.attributes["hidream.resumed_from_step"] == 2


def test_steps_of_a_claim_that_ends_early_are_no_error() -> None:
    stages, job, spans = traced()
    stages.observe(StepFinished(1, 1.0, (1.0,)), job, 103.0, 103.0)
    stages.close()
    stages.close()
    assert [(span.name, span.error) for span in spans[1:]] == [("denoise on rank", None), ("denoise", None)]


def test_another_claim_of_a_job_adds_no_second_wait_and_says_from_where_it_goes_on() -> None:
    claimed = replace(
        accepted(CALL.child()).started(EXECUTION, 101.0), snapshot=StoredSnapshot(1, 3), claim_number=2
    )
    spans = list[FinishedSpan]()
    stages = StageSpans(claimed, spans.append)
    stages.observe(RequestStarted(), claimed, 120.0, 120.0)
    stages.observe(PromptsEncoded(0.5, (0.5,)), claimed, 121.0, 121.0)
    (encode,) = spans
    assert (encode.name, encode.start_time, encode.end_time) == ("encode", 120.0, 120.5)
    assert encode.attributes["hidream.resumed_from_step"] == 3


def test_the_span_of_a_job_has_the_ids_that_it_was_accepted_with_and_its_error() -> None:
    job, spans = accepted(CALL.child()).started(EXECUTION, 101.0), list[FinishedSpan]()
    JobSpans(spans.append).observe_end(job.ended(JobState.FAILED, 105.0, JobInternalError("e1d2")))
    (span,) = spans
    assert span.context == job.trace
    assert span.context.parent_span_id == CALL.span_id
    assert span.context.trace_state == CALL.trace_state
    assert (span.start_time, span.end_time) == (100.0, 105.0)
    assert "e1d2" in (span.error or "")


def test_jobs_that_are_not_traced_or_not_sampled_have_no_spans() -> None:
    spans = list[FinishedSpan]()
    for trace in (None, replace(CALL, is_sampled=False).child()):
        job = accepted(trace)
        assert not StageSpans(job, spans.append).is_traced
        JobSpans(spans.append).observe_end(job.ended(JobState.CANCELLED, 105.0))
    assert not StageSpans(accepted(CALL.child()), None).is_traced
    assert spans == []
