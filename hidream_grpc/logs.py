"""One way to log, in the server and in every rank: to the terminal, and to a file when one is named."""

from __future__ import annotations

import logging
import sys
import traceback
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pythonjsonlogger.json import JsonFormatter

logger = logging.getLogger(__name__)

# What a log record may carry besides its message, in the order in which a text line shows it.
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


class _TextFormatter(logging.Formatter):
    """`time level logger: message fact=value …`."""

    def format(self, record: logging.LogRecord) -> str:
        facts = [
            f"{name}={value}" for name in FACTS if (value := getattr(record, name, "")) not in ("", None)
        ]
        line = super().format(record)
        if not facts:
            return line
        first, newline, traceback = line.partition("\n")
        return f"{first} {' '.join(facts)}{newline}{traceback}"


def configure_logging(config: LogConfig) -> None:
    """Set up the root logger of this process. Several processes may append to one file."""
    formatter: logging.Formatter
    if config.format == "json":
        formatter = JsonFormatter(
            ["asctime", "levelname", "name", "message"],
            rename_fields={"asctime": "time", "levelname": "level", "name": "logger"},
        )
    else:
        formatter = _TextFormatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s")
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if config.file is not None:
        config.file.parent.mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(config.file, encoding="utf-8"))
    for handler in handlers:
        handler.setFormatter(formatter)
    if config.level != "DEBUG":
        handlers[0].addFilter(lambda record: not getattr(record, _NOT_ON_TERMINAL, False))
    logging.basicConfig(level=config.level, handlers=handlers, force=True)
    # It tells of each look at the schema.
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.captureWarnings(True)


def log_unforeseen(error: Exception) -> str:
    """Log the traceback of an error that ends the process, to the terminal at DEBUG only.

    Returns:
        The id of the error in the log.
    """
    error_id = uuid.uuid4().hex
    facts = {"error_id": error_id, _NOT_ON_TERMINAL: True}
    # Python writes to the terminal itself what is logged before `configure_logging`.
    if logging.getLogger().handlers:
        logger.error("the process ends by an internal error", exc_info=error, extra=facts)
    return error_id


def place_of(error: Exception) -> str:
    """File and line of the code that raised an error."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{Path(frames[-1].filename).name}, line {frames[-1].lineno}" if frames else "unknown code"
