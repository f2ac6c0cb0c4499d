"""The fault matrix of docs/operations.md names tests that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
OPERATIONS = TESTS.parent / "docs" / "operations.md"


def fault_rows() -> list[list[str]]:
    """The cells of each fault."""
    section = OPERATIONS.read_text(encoding="utf-8").partition("\n## When things fail\n")[2]
    lines = [line for line in section.partition("\n## ")[0].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_the_matrix_has_the_faults() -> None:
    assert len(fault_rows()) > 20


@pytest.mark.parametrize("row", fault_rows(), ids=lambda row: row[0])
def test_every_fault_is_shown_by_tests_that_exist(row: list[str]) -> None:
    assert len(row) == 4
    names = re.findall(r"`(\S+\.py)::(test_\w+)`", row[3])
    assert names
    for path, name in names:
        module = ast.parse((TESTS / path).read_text(encoding="utf-8"))
        functions = {
            node.name for node in module.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        }
        assert name in functions, f"{path}::{name}"
