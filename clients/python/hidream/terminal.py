"""Durations and tables as text for people."""

from __future__ import annotations

from collections.abc import Iterable


def format_seconds(seconds: float) -> str:
    """Return a duration for people: `85 ms`, `3.2 s`, `2 min 5 s`."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 59.95:  # what would read 60.0 s is a minute
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s"


def table(rows: Iterable[tuple[str, str]]) -> str:
    """Return one fact a line; those without a value are left out."""
    rows = [row for row in rows if row[1]]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)
