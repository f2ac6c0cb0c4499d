"""What is lost is told once, and once when it is back."""

from __future__ import annotations

import logging

import pytest

from hidream_grpc.jobs.outages import Outage

logger = logging.getLogger("hidream_grpc.test")


@pytest.fixture
def outage(caplog: pytest.LogCaptureFixture) -> Outage:
    caplog.set_level(logging.INFO, logger.name)
    return Outage(logger, "read the queue")


def test_however_often_it_fails_the_log_says_it_once_and_why(
    outage: Outage, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(3):
        outage.note_failure(ValueError("it is gone"))
    assert caplog.messages == ["cannot read the queue: it is gone; trying again"]
    assert caplog.records[0].levelno == logging.WARNING


def test_when_it_works_again_the_log_says_so_and_the_next_outage_is_news(
    outage: Outage, caplog: pytest.LogCaptureFixture
) -> None:
    outage.note_failure(ValueError("first"))
    for _ in range(3):
        outage.note_success()
    outage.note_failure(ValueError("second"))
    assert caplog.messages == [
        "cannot read the queue: first; trying again",
        "can read the queue again",
        "cannot read the queue: second; trying again",
    ]


def test_what_never_failed_is_not_told(outage: Outage, caplog: pytest.LogCaptureFixture) -> None:
    outage.note_success()
    assert caplog.messages == []
