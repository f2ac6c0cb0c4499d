"""Which request breaks the rank group. Pure: no clock, no process, no torch.

A request is the culprit only of what happened while it ran alone: one that is in a batch which breaks the
group becomes a suspect, and runs alone until it has come further than it was then. A suspect that breaks
the group alone is the culprit; so is any request that does it alone for the second time. The others are
innocent, whatever they were in.
"""

from __future__ import annotations

from collections.abc import Mapping

from hidream_grpc.engine.running_request import RunningRequest


def find_suspect(running: Mapping[str, RunningRequest]) -> str | None:
    """The request that must run alone now; None when all may run."""
    return next((claim_id for claim_id, request in running.items() if request.is_suspect), None)


def attribute(
    running: Mapping[str, RunningRequest], at_work: Mapping[str, int], *, was_alone: bool
) -> str | None:
    """Record that work went wrong which these requests may have caused.

    Args:
        running: all requests.
        at_work: the progress that each of those in question had then.
        was_alone: whether the work was of one request only, this one.

    Returns:
        The culprit, if it is known; otherwise all in question are suspects from now on.
    """
    if was_alone:
        (claim_id,) = at_work
        if running[claim_id].is_suspect or running[claim_id].has_failed_alone:
            return claim_id
        running[claim_id].has_failed_alone = True
    for claim_id, progress in at_work.items():
        running[claim_id].suspect(progress)
    return None
