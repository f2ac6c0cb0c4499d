"""Refuses at once what cannot end before its deadline, instead of working on it in vain. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from hidream_grpc.errors import DeadlineTooShortError, RequestError, TooBusyForDeadlineError
from hidream_grpc.jobs.estimates.estimator import JobEstimator
from hidream_grpc.jobs.estimates.simulation import JobWork
from hidream_grpc.jobs.job import Submission

MIN_RETRY_SECONDS = 1.0
"""The least delay that a refused caller is told, whatever the estimates say."""


def deadline_refusal(submissions: Sequence[Submission], estimator: JobEstimator) -> RequestError | None:
    """Why a request cannot end before its caller's deadline; None where it may, or where nothing is known.

    An estimate counts only with its known error: a request is refused that would be too late even if it took
    as small a share of the estimate as hardly any job before it. Those of a batch that are alike are judged
    once.
    """
    judged: set[tuple[object, ...]] = set()
    for submission in submissions:
        deadline_seconds = submission.deadline_seconds
        if deadline_seconds is None or submission.is_detached:
            continue
        shape = JobWork("", submission.caller, submission.parameters).shape
        kind = submission.caller, submission.priority, deadline_seconds, *shape
        if kind in judged:
            continue
        judged.add(kind)
        earliest = estimator.late_end(submission, deadline_seconds)
        if earliest is None:
            continue
        if earliest.alone_seconds > deadline_seconds:
            return DeadlineTooShortError(deadline_seconds, earliest.alone_seconds)
        # What is in front of it will have become so much less by then.
        retry_after_seconds = max(MIN_RETRY_SECONDS, earliest.seconds - deadline_seconds)
        return TooBusyForDeadlineError(deadline_seconds, earliest.seconds, retry_after_seconds)
    return None
