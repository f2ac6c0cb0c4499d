"""The spans of a job: one of its whole life, and one of each stage, from what the engine reports.

The job's own span has ids that are kept with the job: whichever server ends it exports it, with its true
start. The stages are exported as they end, by the server that ran them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from hidream_grpc.engine.requests import (
    EngineEvent,
    ImageFinished,
    PromptsEncoded,
    RequestRestarted,
    RequestStarted,
    StepFinished,
)
from hidream_grpc.jobs.job import Job, JobState
from hidream_grpc.traces import (
    Attributes,
    AttributeValue,
    FailingAlone,
    FinishedSpan,
    RecordSpan,
    SpanEvent,
    TraceContext,
)


@dataclass(slots=True)
class _Denoising:
    """The steps that one attempt has taken; times are seconds since the epoch."""

    context: TraceContext
    start_time: float
    end_time: float = 0.0
    steps: list[SpanEvent] = field(default_factory=list)
    rank_busy_seconds: list[float] = field(default_factory=list)
    rank_end_times: list[float] = field(default_factory=list)

    def add(self, event: StepFinished, end_time: float) -> None:
        """Record a step, which has ended on all ranks at this time."""
        self.end_time = end_time
        seconds = event.rank_step_seconds
        attributes: Attributes = {
            "hidream.step": event.step,
            "hidream.step_seconds": event.step_seconds,
            "hidream.rank_step_seconds": seconds,
        }
        self.steps.append(SpanEvent("step", end_time, attributes))
        # A recovery may change the number of ranks, but begins another attempt.
        busy = self.rank_busy_seconds or [0.0] * len(seconds)
        self.rank_busy_seconds = [a + b for a, b in zip(busy, seconds, strict=True)]
        self.rank_end_times = [end_time - event.step_seconds + own for own in seconds]


class StageSpans:
    """The spans of the stages of one claim.

    Args:
        job: as it was claimed.
        record: exports a span; None where nothing is traced.

    Attributes:
        is_traced: whether spans of this job are exported.
    """

    def __init__(self, job: Job, record: RecordSpan | None) -> None:
        self.is_traced = record is not None and job.trace is not None and job.trace.is_sampled
        self._job_trace = job.trace
        self._record = record
        self._has_waited = job.start_time is None
        self._attempt_time = 0.0
        self._attempt = 1
        self._resumed_from_step = 0
        self._denoising: _Denoising | None = None

    @FailingAlone()
    def observe(self, event: EngineEvent, job: Job, time: float, stored_time: float) -> None:
        """Record what an event of the engine tells; only where the job is traced.

        Args:
            event: one that was applied to the job.
            job: as it is then.
            time: when the event happened, in seconds since the epoch.
            stored_time: when the job and its files had it, on the same clock.
        """
        match event:
            case RequestStarted():
                self._begin(job, time)
            case PromptsEncoded(encode_seconds, rank_seconds):
                # The text encoders are the first that a plan runs.
                end_time = self._attempt_time + encode_seconds
                self._add(
                    "encode", self._attempt_time, end_time, {"hidream.rank_encode_seconds": rank_seconds}
                )
            case StepFinished():
                self._add_step(event, job, time)
            case ImageFinished():
                self._add_image(event, job, time, stored_time)
            case RequestRestarted(reason=reason, resumed_from_step=step):
                self.close(error=reason)
                self._begin_attempt(job, step, time)

    @FailingAlone()
    def close(self, state: str = "", error: str | None = None) -> None:
        """End what is under way, as far as it came: the claim has ended, or the ranks were lost.

        Args:
            state: what became of the job, where that ended its steps before the last one.
            error: why, where that is a failure.
        """
        denoising, self._denoising = self._denoising, None
        if denoising is None:
            return
        ranks = enumerate(zip(denoising.rank_busy_seconds, denoising.rank_end_times, strict=True))
        for rank, (busy_seconds, end_time) in ranks:
            attributes = {"hidream.rank": rank, "hidream.busy_seconds": busy_seconds}
            self._add("denoise on rank", denoising.start_time, end_time, attributes, parent=denoising.context)
        self._add(
            "denoise",
            denoising.start_time,
            denoising.end_time,
            {"hidream.num_steps": len(denoising.steps)} | ({"hidream.state": state} if state else {}),
            context=denoising.context,
            events=denoising.steps,
            error=error,
        )

    def _begin(self, job: Job, time: float) -> None:
        self._begin_attempt(job, 0 if job.snapshot is None else job.snapshot.step, time)
        if self._has_waited and job.start_time is not None:
            self._has_waited = False
            self._add("queue", job.create_time, job.start_time, {})

    def _begin_attempt(self, job: Job, resumed_from_step: int, time: float) -> None:
        self._attempt_time = time
        self._attempt = 1 if job.execution is None else job.execution.attempt
        self._resumed_from_step = resumed_from_step

    def _add_step(self, event: StepFinished, job: Job, time: float) -> None:
        assert self._job_trace is not None
        if self._denoising is None:
            self._denoising = _Denoising(self._job_trace.child(), time - event.step_seconds)
        self._denoising.add(event, time)
        if event.step == job.submission.parameters.num_inference_steps:
            self.close()

    def _add_image(self, event: ImageFinished, job: Job, time: float, stored_time: float) -> None:
        attributes = {"hidream.image_index": event.image_index}
        self._add("decode", time - event.decode_seconds, time, {**attributes, "hidream.rank": event.rank})
        self._add("store", time, stored_time, {**attributes, "hidream.image_bytes": len(event.data)})

    def _add(
        self,
        name: str,
        start_time: float,
        end_time: float,
        attributes: Attributes,
        *,
        context: TraceContext | None = None,
        parent: TraceContext | None = None,
        events: Sequence[SpanEvent] = (),
        error: str | None = None,
    ) -> None:
        assert self._job_trace is not None
        assert self._record is not None
        common: dict[str, AttributeValue] = {"hidream.attempt": self._attempt}
        if self._resumed_from_step:
            common["hidream.resumed_from_step"] = self._resumed_from_step
        context = context or (parent or self._job_trace).child()
        self._record(
            FinishedSpan(name, context, start_time, end_time, {**common, **attributes}, events, error)
        )


class JobSpans:
    """Exports the span of each job that this server ends.

    Args:
        record: exports a span; None where nothing is traced.
    """

    def __init__(self, record: RecordSpan | None) -> None:
        self._record = record

    @FailingAlone()
    def observe_end(self, job: Job) -> None:
        """Export the span of a job that has ended, however many servers ran it."""
        if self._record is None or job.trace is None or not job.trace.is_sampled:
            return
        assert job.end_time is not None
        if job.start_time is None:
            self._record(FinishedSpan("queue", job.trace.child(), job.create_time, job.end_time, {}))
        error = None
        if job.state is JobState.FAILED:
            error = str(job.error)
        self._record(
            FinishedSpan("job", job.trace, job.create_time, job.end_time, _attributes(job), error=error)
        )


def _attributes(job: Job) -> Attributes:
    # No prompt: logs show it at DEBUG only, too.
    parameters = job.submission.parameters
    attributes: dict[str, AttributeValue] = {
        "hidream.job_id": job.job_id,
        "hidream.request_id": job.submission.request_id,
        "hidream.state": job.state.value,
        "hidream.width": parameters.width,
        "hidream.height": parameters.height,
        "hidream.num_inference_steps": parameters.num_inference_steps,
        "hidream.num_images": parameters.num_images,
        "hidream.num_claims": job.claim_number,
    }
    if job.execution is not None:
        attributes |= {
            "hidream.model": job.execution.model,
            "hidream.layout": job.execution.layout,
            "hidream.attempt": job.execution.attempt,
        }
    return attributes
