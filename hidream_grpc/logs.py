"""One way to log, in the server and in every rank: to the terminal, and to a file when one is named."""

from __future__ import annotations

import errno
import logging
import sys
import traceback
import uuid
from dataclasses import dataclass
from datetime import datetime
from logging.handlers import WatchedFileHandler
from pathlib import Path
from typing import Literal

from pythonjsonlogger.json import JsonFormatter

from hidream_grpc.log_streams import drain_streams, dropping_file_stream
from hidream_grpc.traces import add_trace_ids

logger = logging.getLogger(__name__)

# What a text line shows besides its message, in this order; a JSON line has all that a record carries.
FACTS = (
    "rank",
    "generation",
    "request_id",
    "job_id",
    "error_id",
    "peer",
    "caller",
    "call_seconds",
    "total_seconds",
    "trace_id",
    "span_id",
)


@dataclass(frozen=True, slots=True)
class LogConfig:
    """How to log.

    Attributes:
        level: DEBUG, INFO, WARNING or ERROR. Prompts are logged at DEBUG only.
        format: lines for people, or one JSON object a line.
        file: also append to this file.
    """

    level: str = "INFO"
    format: Literal["text", "json"] = "text"
    file: Path | None = None


_NOT_ON_TERMINAL = "is_not_on_terminal"
NOT_ON_TERMINAL = {_NOT_ON_TERMINAL: True}
"""The `extra` of a record that is for the file, and on the terminal at DEBUG only."""
_SPELT_OUT = {number: repr(chr(number))[1:-1] for number in (*range(0x20), *range(0x7F, 0xA0))}


def one_line(text: str) -> str:
    """The text with its control characters spelt out: a name or a prompt makes no line of its own."""
    return text.translate(_SPELT_OUT)


class _TextFormatter(logging.Formatter):
    """`time level logger: message fact=value …`."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  (logging's name)
        record.message = one_line(record.message)
        return super().formatMessage(record)

    def format(self, record: logging.LogRecord) -> str:
        facts = [
            f"{name}={one_line(str(value))}"
            for name in FACTS
            if (value := getattr(record, name, "")) not in ("", None)
        ]
        line = super().format(record)
        if not facts:
            return line
        first, newline, traceback = line.partition("\n")
        return f"{first} {' '.join(facts)}{newline}{traceback}"


class _JsonFormatter(JsonFormatter):
    """An object with all facts of a record, and its time in ISO 8601 with the zone of the machine."""

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: N802  (logging's)
        return datetime.fromtimestamp(record.created).astimezone().isoformat(timespec="milliseconds")


def configure_logging(config: LogConfig, may_start_threads: bool = False) -> None:
    """Set up the root logger of this process. Several processes may append to one file.

    Args:
        config: how to log.
        may_start_threads: without them a file system that hangs holds this process up.

    Raises:
        OSError: the file cannot be opened, or is neither a regular one nor a character device.
    """
    formatter: logging.Formatter
    if config.format == "json":
        formatter = _JsonFormatter(
            ["asctime", "levelname", "name", "message"],
            rename_fields={"asctime": "time", "levelname": "level", "name": "logger"},
        )
    else:
        formatter = _TextFormatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s")
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if config.file is not None:
        config.file.parent.mkdir(parents=True, exist_ok=True)
        handlers.append(_file_handler(config.file, may_start_threads))
    for handler in handlers:
        handler.setFormatter(formatter)
        handler.addFilter(add_trace_ids)
    if config.level != "DEBUG":
        handlers[0].addFilter(lambda record: not getattr(record, _NOT_ON_TERMINAL, False))
    logging.basicConfig(level=config.level, handlers=handlers, force=True)
    # It tells of each look at the schema.
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("grpc._cython.cygrpc").addFilter(_is_no_departure)
    logging.captureWarnings(True)


def _is_no_departure(record: logging.LogRecord) -> bool:
    """Whether a record of grpc's is more than a traceback of a caller which left while a message was sent.

    The access log has its one line: CANCELLED.
    """
    return not record.getMessage().startswith("ExecuteBatchError raised in core")


def _file_handler(file: Path, may_start_threads: bool) -> logging.Handler:
    # A pipe would hold ranks up, and an open of it waits for a reader.
    if file.exists() and not (file.is_file() or file.is_char_device()):
        raise OSError(errno.EINVAL, "it is no regular file")
    # A file that is moved away, as logrotate does, is begun anew.
    if not may_start_threads:
        return WatchedFileHandler(file, encoding="utf-8", errors="backslashreplace")
    return logging.StreamHandler(dropping_file_stream(file))


def end_logging() -> None:
    """Write what was logged, before an end of the process that Python does not know of."""
    logging.shutdown()
    drain_streams()


def log_unforeseen(error: Exception) -> str:
    """Log the traceback of an error that ends the process, to the terminal at DEBUG only.

    Returns:
        The id of the error in the log.
    """
    error_id = uuid.uuid4().hex
    facts = {"error_id": error_id, **NOT_ON_TERMINAL}
    # Python writes to the terminal itself what is logged before `configure_logging`.
    if logging.getLogger().handlers:
        logger.error("the process ends by an internal error", exc_info=error, extra=facts)
    return error_id


def place_of(error: Exception) -> str:
    """File and line of the code that raised an error."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{Path(frames[-1].filename).name}, line {frames[-1].lineno}" if frames else "unknown code"
