from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import pytest

from hidream_grpc.logs import FACTS, LogConfig, configure_logging
from hidream_grpc.traces import TraceContext, enter_trace


@contextmanager
def configured(config: LogConfig) -> Iterator[None]:
    """Log as configured; afterwards the root logger is as it was."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    root.handlers.clear()
    configure_logging(config)
    try:
        yield
    finally:
        for handler in root.handlers:
            handler.close()
        root.handlers[:] = handlers
        root.setLevel(level)
        logging.captureWarnings(False)


logger = logging.getLogger("hidream_grpc.piece")


def test_a_text_line_has_time_level_logger_message_and_facts(capsys: pytest.CaptureFixture[str]) -> None:
    with configured(LogConfig()):
        logger.warning("a rank is slow", extra={"rank": 0, "job_id": "j1", "request_id": ""})
    date, time, rest = capsys.readouterr().err.split(" ", 2)
    assert len(date.split("-")) == 3
    assert len(time.split(":")) == 3
    assert rest == "WARNING hidream_grpc.piece: a rank is slow rank=0 job_id=j1\n"


async def test_lines_of_a_task_that_is_traced_have_the_ids_of_its_span(
    capsys: pytest.CaptureFixture[str],
) -> None:
    of_call, of_job = TraceContext("c" * 32, "a" * 16), TraceContext("c" * 32, "b" * 16)

    async def work() -> None:
        enter_trace(of_call)
        logger.info("served")
        logger.info("drawn", extra=of_job.log_fields)

    with configured(LogConfig()):
        await asyncio.create_task(work())
        logger.info("beside it")
    endings = [line.partition(": ")[2] for line in capsys.readouterr().err.splitlines()]
    assert endings == [
        f"served trace_id={'c' * 32} span_id={'a' * 16}",
        f"drawn trace_id={'c' * 32} span_id={'b' * 16}",
        "beside it",
    ]


def test_a_message_or_a_fact_with_control_characters_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with configured(LogConfig()):
        logger.info("the folder %s", "a\nb\x1b[2J", extra={"job_id": "j\r\n1"})
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(r"the folder a\nb\x1b[2J job_id=j\r\n1")


def test_facts_stand_before_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    with configured(LogConfig()):
        try:
            raise ValueError("why")
        except ValueError:
            logger.exception("it failed", extra={"error_id": "e1"})
    first, *traceback = capsys.readouterr().err.splitlines()
    assert first.endswith("it failed error_id=e1")
    assert traceback[-1] == "ValueError: why"


def test_a_json_line_is_an_object_with_every_fact(capsys: pytest.CaptureFixture[str]) -> None:
    with configured(LogConfig(format="json")):
        facts = {name: f"value of {name}" for name in FACTS}
        logger.info("a job %s", "ended", extra=facts)
        logger.error("two\nlines")
    first, second = (json.loads(line) for line in capsys.readouterr().err.splitlines())
    assert {name: first[name] for name in FACTS} == facts
    assert (first["level"], first["logger"], first["message"]) == (
        "INFO",
        "hidream_grpc.piece",
        "a job ended",
    )
    assert datetime.fromisoformat(first["time"]).utcoffset() is not None
    assert second["message"] == "two\nlines"


def test_a_traceback_is_part_of_its_json_object(capsys: pytest.CaptureFixture[str]) -> None:
    with configured(LogConfig(format="json")):
        try:
            raise ValueError("why")
        except ValueError:
            logger.exception("it failed")
    (line,) = capsys.readouterr().err.splitlines()
    assert "ValueError: why" in json.loads(line)["exc_info"]


@pytest.mark.parametrize("level", ["DEBUG", "INFO", "WARNING", "ERROR"])
def test_nothing_below_the_level_is_logged(capsys: pytest.CaptureFixture[str], level: str) -> None:
    with configured(LogConfig(level=level)):
        for name in ("DEBUG", "INFO", "WARNING", "ERROR"):
            logger.log(logging.getLevelNamesMapping()[name], "message of %s", name)
    logged = [line.rpartition(" ")[2] for line in capsys.readouterr().err.splitlines()]
    assert logged == ["DEBUG", "INFO", "WARNING", "ERROR"][-len(logged) :]
    assert logged[0] == level


def test_the_file_gets_the_lines_of_the_terminal_after_those_that_it_has(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "logs" / "server.log"
    file.parent.mkdir()
    file.write_text("an older line\n", encoding="utf-8")
    with configured(LogConfig(file=file)):
        logger.info("红色圆形")
    assert file.read_text(encoding="utf-8") == "an older line\n" + capsys.readouterr().err


def test_a_rank_begins_a_file_anew_that_was_moved_away(tmp_path: Path) -> None:
    file = tmp_path / "server.log"
    with configured(LogConfig(file=file)):
        logger.info("one")
        file.rename(tmp_path / "server.log.1")
        logger.info("two")
    assert file.read_text(encoding="utf-8").endswith("two\n")


def test_the_folder_of_the_file_is_made(tmp_path: Path) -> None:
    with configured(LogConfig(file=tmp_path / "new" / "logs" / "server.log")):
        logger.info("first line")
    assert (tmp_path / "new" / "logs" / "server.log").read_text(encoding="utf-8").endswith("first line\n")
