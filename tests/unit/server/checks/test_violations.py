"""However much is wrong with a request, its caller is told."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hidream_grpc.errors import FieldViolation
from hidream_grpc.server.checks.violations import invalid_request
from hidream_grpc.server.status import to_status

MAX_HEADER_BYTES = 8192
OTHER_HEADERS_BYTES = 300
"""Names of the two headers, and the headers that every answer has; 32 bytes are charged for each."""


def header_bytes(violations: list[FieldViolation]) -> int:
    """The size of the status: its text is percent-encoded, its details are in base64."""
    status = to_status(invalid_request(violations))
    text_bytes = sum(1 if " " <= c <= "~" else 3 * len(c.encode()) for c in status.message)
    return text_bytes + -(-len(status.SerializeToString()) // 3) * 4


fields = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60)
descriptions = st.text(st.characters(min_codepoint=32, max_codepoint=255), min_size=1, max_size=200)


@given(st.lists(st.builds(FieldViolation, fields, descriptions), min_size=1, max_size=60))
def test_an_answer_fits_the_headers_that_clients_accept(violations: list[FieldViolation]) -> None:
    assert header_bytes(violations) + OTHER_HEADERS_BYTES < MAX_HEADER_BYTES
    named = invalid_request(violations).violations
    assert [v.field for v in named] == [v.field for v in violations[: len(named)]]
    assert named[:-1] == tuple(violations[: len(named) - 1])
    if num_left := len(violations) - len(named):
        assert named[-1].description.endswith(f"; {num_left} more violations do not fit here")
    else:
        assert named[-1] == violations[-1]


def test_a_great_many_small_violations_fit_too() -> None:
    violations = [FieldViolation("f", "x") for _ in range(100_000)]
    assert header_bytes(violations) + OTHER_HEADERS_BYTES < MAX_HEADER_BYTES
    assert len(invalid_request(violations).violations) > 100


def test_as_many_wrong_sizes_as_a_batch_may_have_are_told_in_good_part() -> None:
    description = "must be a multiple of 16 from 64 on, with width × height at most 1048576; is 65, is it not"
    violations = [FieldViolation(f"requests[{n}].spec.width", description) for n in range(64)]
    assert len(invalid_request(violations).violations) >= 15
