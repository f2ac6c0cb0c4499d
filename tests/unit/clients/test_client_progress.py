from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest

from hidream import events
from hidream.progress import ProgressBar, progress_display
from hidream.terminal import format_seconds
from hidream.v1 import image_pb2, job_pb2

LOST = "to go on with job a: hidream watch a"
COMMON: dict[str, Any] = {"job_id": "job-1", "sequence": 1, "time": datetime.now(UTC)}


def progress(step: int, remaining_seconds: float | None = None) -> events.Progress:
    return events.Progress(
        step=step, total_steps=8, step_seconds=0.25, estimated_remaining_seconds=remaining_seconds, **COMMON
    )


def progress_of(step: int, total_steps: int) -> events.Progress:
    return replace(progress(step), total_steps=total_steps)


def started(num_inference_steps: int = 8) -> events.Started:
    spec = image_pb2.ImageSpec(num_inference_steps=num_inference_steps, num_images=1)
    return events.Started(spec=spec, execution=job_pb2.Execution(), queue_seconds=0, **COMMON)


def succeeded() -> events.Succeeded:
    timings = dict.fromkeys(events.Timings.__annotations__, 0.5)
    return events.Succeeded(job=job_pb2.Job(), timings=events.Timings(**timings), **COMMON)


def shown(capsys: pytest.CaptureFixture[str], *stream: events.Event, is_shown: bool = True) -> str:
    with ProgressBar(is_shown=is_shown) as bar:
        for event in stream:
            bar.show(event)
    output = capsys.readouterr()
    assert output.out == ""
    return output.err


def test_the_bar_shows_the_place_in_the_queue(capsys: pytest.CaptureFixture[str]) -> None:
    queued = events.Queued(queue_position=3, estimated_wait_seconds=12.0, **COMMON)
    assert "queued, position 3, about 12.0 s to wait" in shown(capsys, queued)


def test_the_bar_shows_every_step_with_its_time_and_what_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(capsys, started(), *(progress(step, 8.0 - step) for step in range(1, 9))).split("\r")
    for step in range(1, 9):
        [line, *_] = [line for line in lines if f"step {step} of 8" in line and "a step" in line]
        assert "250 ms a step" in line
        assert (f"{format_seconds(8.0 - step)} left" in line) == (step < 8)


def test_the_bar_goes_back_to_where_a_restart_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    restarted = events.Restarted(attempt=2, reason="rank 1: killed", resumed_from_step=2, **COMMON)
    output = shown(capsys, started(), progress(5), restarted, progress(3))
    assert "attempt 2: rank 1: killed; goes on after step 2" in output
    assert output.rindex("step 5 of 8") < output.index("step 2 of 8") < output.index("step 3 of 8")


def test_a_quiet_bar_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    restarted = events.Restarted(attempt=2, reason="rank 1: killed", resumed_from_step=0, **COMMON)
    assert shown(capsys, started(), progress(1), restarted, is_shown=False) == ""


def test_nothing_is_left_when_the_job_is_done(capsys: pytest.CaptureFixture[str]) -> None:
    *_, last = shown(capsys, started(), progress(8, 0.9), succeeded()).strip("\n").split("\r")
    assert last.startswith("done")
    assert "step 8 of 8, 250 ms a step" in last
    assert "left" not in last


def test_a_log_file_gets_a_few_lines_and_no_frames(capsys: pytest.CaptureFixture[str]) -> None:
    queued = events.Queued(queue_position=3, estimated_wait_seconds=None, **COMMON)
    with progress_display(is_shown=True) as display:
        stream: list[events.Event] = [queued, queued, started(40)]
        for event in [*stream, *(progress_of(step, 40) for step in range(1, 41))]:
            display.show(event)
        display.show_connection_lost(LOST)
        display.show_connection_lost(LOST)
        display.show(succeeded())
    output = capsys.readouterr()
    assert output.out == ""
    *lines, last = output.err.split("\n")
    assert [line.split(",")[0] for line in lines[:-1]] == [
        "queued",
        *(f"step {step} of 40" for step in (1, 10, 20, 30, 40)),
        "connection lost",
    ]
    assert "denoise 500 ms" in lines[-1]
    assert (last, "\r" in output.err) == ("", False)
