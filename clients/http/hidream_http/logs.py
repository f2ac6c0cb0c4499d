"""How the bridge logs: lines as those of the server, or one JSON object a line."""

from __future__ import annotations

import logging
import sys
from datetime import datetime

from pythonjsonlogger.json import JsonFormatter

# What a text line shows besides its message, in this order; a JSON line has all that a record carries.
FACTS = ("job_id", "peer", "sent_bytes", "call_seconds", "trace_id", "span_id")

_SPELT_OUT = {number: repr(chr(number))[1:-1] for number in (*range(0x20), *range(0x7F, 0xA0))}


def one_line(text: str) -> str:
    """The text with its control characters spelt out: a path makes no line of its own."""
    return text.translate(_SPELT_OUT)


class _TextFormatter(logging.Formatter):
    """`time level logger: message fact=value …`."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  (logging's name)
        record.message = one_line(record.message)
        facts = [
            f" {name}={one_line(str(value))}"
            for name in FACTS
            if (value := getattr(record, name, "")) not in ("", None)
        ]
        return super().formatMessage(record) + "".join(facts)


class _JsonFormatter(JsonFormatter):
    """An object with all facts of a record, and its time in ISO 8601 with the zone of the machine."""

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: N802  (logging's)
        return datetime.fromtimestamp(record.created).astimezone().isoformat(timespec="milliseconds")


def configure_logging(level: str, *, as_json: bool) -> None:
    """Set up the root logger of this process."""
    formatter: logging.Formatter
    if as_json:
        formatter = _JsonFormatter(
            ["asctime", "levelname", "name", "message"],
            rename_fields={"asctime": "time", "levelname": "level", "name": "logger"},
        )
    else:
        formatter = _TextFormatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    logging.basicConfig(level=level, handlers=[handler], force=True)
    uvicorn = logging.getLogger("uvicorn.error")
    # Its own words for a start and an end, which we have others for.
    uvicorn.setLevel(max(logging.getLogger().level, logging.WARNING))
    uvicorn.addFilter(_is_no_broken_stream)


def _is_no_broken_stream(record: logging.LogRecord) -> bool:
    """Whether a record of uvicorn's is more than our way to break a stream off, of which we log more."""
    return not record.getMessage().startswith("ASGI callable returned without completing")
