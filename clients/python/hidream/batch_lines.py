"""A batch as JSON Lines: each line is one job, with the names of `hidream.requests.submit_request`."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from hidream.errors import FieldViolation, HiDreamError, InvalidArgumentError
from hidream.requests import submit_request
from hidream.v1 import image_gen_pb2

_NAMES = set(inspect.signature(submit_request).parameters)
_FIELD_OF_BATCH = re.compile(r"requests\[(\d+)\](?:\.(?:spec\.)?(.+))?")


@dataclass(frozen=True, slots=True)
class LineViolation:
    """One thing that is wrong: in which line, from 1, and which field; `field` is empty for the line."""

    line_number: int
    field: str
    description: str


class InvalidLinesError(HiDreamError):
    """Lines that are no jobs; nothing was sent, or nothing was accepted.

    Attributes:
        violations: what is wrong, by line.
    """

    def __init__(self, violations: Sequence[LineViolation]) -> None:
        first = violations[0]
        super().__init__(f"line {first.line_number}: {first.field} {first.description}")
        self.violations = tuple(violations)


@dataclass(frozen=True, slots=True)
class BatchLines:
    """The jobs of a batch, and the line that each stands in; empty lines are none."""

    requests: tuple[image_gen_pb2.SubmitJobRequest, ...]
    line_numbers: tuple[int, ...]

    @classmethod
    def parse(cls, lines: Iterable[bytes], default_model: str | None = None) -> BatchLines:
        """Check every line.

        Args:
            lines: JSON, an object each.
            default_model: of the lines that name none; None is the server's.

        Raises:
            InvalidLinesError: names everything that is wrong in any of them.
        """
        requests, line_numbers, violations = [], [], []
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                requests.append(_request(line, default_model))
                line_numbers.append(number)
            except InvalidArgumentError as error:
                violations += [
                    LineViolation(number, violation.field.removeprefix("spec."), violation.description)
                    for violation in error.violations
                ]
        if violations:
            raise InvalidLinesError(violations)
        return cls(tuple(requests), tuple(line_numbers))

    def refused(self, error: InvalidArgumentError) -> InvalidLinesError | InvalidArgumentError:
        """The server's refusal, by line; the refusal itself where it is not about lines."""
        violations = []
        for violation in error.violations:
            match = _FIELD_OF_BATCH.fullmatch(violation.field)
            if match is None or int(match[1]) >= len(self.line_numbers):
                return error
            violations.append(
                LineViolation(self.line_numbers[int(match[1])], match[2] or "", violation.description)
            )
        return InvalidLinesError(violations) if violations else error


def _request(line: bytes, default_model: str | None) -> image_gen_pb2.SubmitJobRequest:
    fields = _object(line)
    violations = [FieldViolation(name, "there is no such field") for name in fields if name not in _NAMES]
    if fields.get("prompt") is None:
        violations.append(FieldViolation("prompt", "is required"))
    known = {name: value for name, value in fields.items() if name in _NAMES}
    if known.get("model") is None:
        known["model"] = default_model
    try:
        request = submit_request(**{"prompt": None, **known})
    except InvalidArgumentError as error:
        violations += error.violations
    if violations:
        raise InvalidArgumentError.from_violations(tuple(violations))
    return request


def _object(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line.decode("utf-8-sig"), object_pairs_hook=_without_repetition)
    except UnicodeDecodeError as error:
        raise _invalid("is not UTF-8") from error
    except json.JSONDecodeError as error:
        raise _invalid(f"is not JSON: {error.msg} at column {error.colno}") from error
    if not isinstance(value, dict):
        raise _invalid("is not a JSON object")
    return value


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    repeated = {name for name in names if names.count(name) > 1}
    if repeated:
        raise InvalidArgumentError.from_violations(
            tuple(FieldViolation(name, "stands there twice") for name in sorted(repeated))
        )
    return dict(pairs)


def _invalid(description: str) -> InvalidArgumentError:
    return InvalidArgumentError.from_violations((FieldViolation("", description),))
