"""Makes one error, which its caller can receive, of all that is wrong with a request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from hidream_grpc.errors import FieldViolation, InvalidRequestError
from hidream_grpc.jobs.limits import RequestLimits
from hidream_grpc.server.checks.submissions import JobRequest, reconnect_window_seconds

MAX_STATUS_BYTES = 7_500
"""A status travels in headers, of which clients accept 8 KiB: a longer one hides what was wrong."""
FRAME_BYTES = 8
"""Bytes that a violation takes in the details at most, besides its text."""
MAX_LABELS_NAMED = 4
MAX_LABEL_CHARACTERS_SHOWN = 32


def invalid_request(violations: Sequence[FieldViolation]) -> InvalidRequestError:
    """The error that names these violations, or the first and their number where a status cannot hold all."""
    named: list[FieldViolation] = []
    num_bytes = 0
    for violation in violations:
        num_bytes += _status_bytes(violation)
        if named and num_bytes > MAX_STATUS_BYTES:
            break
        named.append(violation)
    if num_left := len(violations) - len(named):
        description = f"{named[-1].description}; {num_left} more violations do not fit here"
        named[-1] = replace(named[-1], description=description)
    return InvalidRequestError(tuple(named))


def request_id_violations(request: JobRequest, limits: RequestLimits) -> list[FieldViolation]:
    """The violations of a request id; an empty one is made up by the server."""
    request_id = request.request_id
    is_visible = all("!" <= character <= "~" for character in request_id)
    if is_visible and len(request_id) <= limits.max_request_id_bytes:
        return []
    description = f"must be at most {limits.max_request_id_bytes} bytes of visible ASCII"
    return [FieldViolation("request_id", description)]


def reconnect_window_violations(request: JobRequest, limits: RequestLimits) -> list[FieldViolation]:
    """The violations of a reconnect window; requests without one have none."""
    seconds = reconnect_window_seconds(request)
    if not 0 <= seconds <= limits.max_reconnect_window_seconds:
        description = f"must be 0 to {limits.max_reconnect_window_seconds} seconds"
    elif seconds and not request.request_id:
        description = "needs a request_id, by which the job is found again"
    else:
        return []
    return [FieldViolation("reconnect_window", description)]


def label_violations(labels: Mapping[str, str], limits: RequestLimits) -> list[FieldViolation]:
    """The violations of labels."""
    violations = []
    if len(labels) > limits.max_labels:
        description = f"must be at most {limits.max_labels} labels, are {len(labels)}"
        violations.append(FieldViolation("labels", description))
    description = f"keys must not be empty; keys and values at most {limits.max_label_bytes} bytes"
    wrong = [
        key
        for key, value in sorted(labels.items())
        if not key or max(len(key.encode()), len(value.encode())) > limits.max_label_bytes
    ]
    for key in wrong[:MAX_LABELS_NAMED]:
        violations.append(FieldViolation(f"labels[{key[:MAX_LABEL_CHARACTERS_SHOWN]}]", description))
    if len(wrong) > MAX_LABELS_NAMED:
        description = f"{description}; so are {len(wrong) - MAX_LABELS_NAMED} more labels wrong"
        violations.append(FieldViolation("labels", description))
    return violations


def _status_bytes(violation: FieldViolation) -> int:
    """Bytes of a violation in a status: percent-encoded in its text, and twice in its details, in base64."""
    text = f"{violation.field}: {violation.description}; "
    text_bytes = sum(1 if " " <= character <= "~" else 3 * len(character.encode()) for character in text)
    return text_bytes + (2 * len(text.encode()) + FRAME_BYTES) * 4 // 3
