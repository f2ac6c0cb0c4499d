"""Names that a file system allows, and that URLs, templates or command lines read otherwise."""

from __future__ import annotations

import os

ODD_FILE_NAMES = (
    "a b",
    " a",
    "a?mode=memory",
    "a#b",
    "%41",
    "a:b",
    ":memory:",
    "a@b",
    "ü漢",
    "a\nb",
    "-x",
    "{a}",
    os.fsdecode(b"\xff"),
)
ALL_IN_ONE = "- a?b#c%41:@ü\n{d}" + os.fsdecode(b"\xff")
"""What is odd about each of them, in one name."""
