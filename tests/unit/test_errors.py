from __future__ import annotations

import inspect
import re

import hidream_grpc.errors
from hidream_grpc.errors import (
    FieldViolation,
    HiDreamError,
    InvalidRequestError,
    JobInternalError,
    ModelNotServedError,
)


def test_the_tree_at_the_top_of_the_module_shows_every_error_below_its_parent() -> None:
    drawing = inspect.getdoc(hidream_grpc.errors) or ""
    parents: dict[str, str] = {}
    path: list[str] = []
    for line in drawing.splitlines():
        if match := re.match(r"( *(?:│   |    )*(?:[├└]── )?)(\w+Error)\b", line):
            depth = (len(match[1]) - 4) // 4
            path = [*path[:depth], match[2]]
            if depth:
                parents[match[2]] = path[depth - 1]
    real = {
        name: error.__bases__[0].__name__
        for name, error in inspect.getmembers(hidream_grpc.errors, inspect.isclass)
        if issubclass(error, HiDreamError) and error is not HiDreamError
    }
    assert parents == real


def test_a_bad_request_names_every_field_in_its_text() -> None:
    violations = (FieldViolation("spec.width", "is odd"), FieldViolation("labels", "are too many"))
    error = InvalidRequestError(violations)
    assert str(error) == "spec.width: is odd; labels: are too many"
    assert error.violations == violations


def test_a_model_that_nobody_serves_is_refused_with_those_that_live() -> None:
    assert str(ModelNotServedError("dev", ("demo", "full"))) == (
        "no live server serves the model 'dev'; live models: demo, full"
    )
    assert str(ModelNotServedError("dev", ())).endswith("live models: none")


def test_every_internal_error_has_an_id_of_its_own() -> None:
    assert len({JobInternalError.new().error_id for _ in range(100)}) == 100
