"""Writes the tables of docs/configuration.md from `Settings`; with --check fails where they differ."""

from __future__ import annotations

import sys
from itertools import groupby
from pathlib import Path

from hidream_grpc.settings import Settings, flag_name, variable_name
from hidream_grpc.settings_help import default_words, help_of, range_words, type_words

PAGE = Path(__file__).parent.parent / "docs" / "configuration.md"
MARK = "<!-- What follows is written by `scripts/generate`. -->\n"


def tables() -> str:
    """One table for each group of settings, in Markdown."""
    lines = []
    for group, fields in groupby(Settings.model_fields.items(), key=lambda item: help_of(item[1]).group):
        lines += [
            f"\n## {group}\n",
            "| flag | environment variable | type | default | meaning |",
            "|---" * 5 + "|",
        ]
        for name, field in fields:
            bounds = range_words(field)
            cells = (
                f"`{flag_name(name)}`",
                f"`{variable_name(name)}`",
                f"{type_words(field)}, {bounds}" if bounds else type_words(field),
                default_words(field) if field.default is None else f"`{default_words(field)}`",
                help_of(field).meaning,
            )
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the page, or compare it."""
    text = PAGE.read_text(encoding="utf-8")
    written = text.partition(MARK)[0] + MARK + tables()
    if sys.argv[1:] == ["--check"]:
        if text != written:
            sys.exit(f"{PAGE.name} is not what Settings says: run scripts/generate")
    else:
        PAGE.write_text(written, encoding="utf-8")


if __name__ == "__main__":
    main()
