from datetime import UTC, datetime
from typing import Any

import pytest

from hidream import events
from hidream.terminal import ProgressBar, format_seconds, info_table
from hidream.v1 import image_pb2, job_pb2, server_info_pb2

COMMON: dict[str, Any] = {"job_id": "job-1", "sequence": 1, "time": datetime.now(UTC)}


def progress(step: int, remaining_seconds: float | None = None) -> events.Progress:
    return events.Progress(
        step=step, total_steps=8, step_seconds=0.25, estimated_remaining_seconds=remaining_seconds, **COMMON
    )


def started(num_inference_steps: int = 8) -> events.Started:
    spec = image_pb2.ImageSpec(num_inference_steps=num_inference_steps, num_images=1)
    return events.Started(spec=spec, execution=job_pb2.Execution(), queue_seconds=0, **COMMON)


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


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.085, "85 ms"), (3.21, "3.2 s"), (59.99, "1 min 0 s"), (125.4, "2 min 5 s")]
)
def test_durations_read_well(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_the_table_shows_every_limit_and_leaves_out_what_is_not_known() -> None:
    names = [field.name for field in server_info_pb2.RequestLimits.DESCRIPTOR.fields]
    limits = server_info_pb2.RequestLimits(**dict.fromkeys(names, 7))
    info = server_info_pb2.ServerInfo(state=server_info_pb2.SERVER_STATE_STARTING, limits=limits)
    rows = dict(line.split(maxsplit=1) for line in info_table(info).splitlines())
    assert rows["state"] == "STARTING"
    assert {name: rows[name] for name in names} == dict.fromkeys(names, "7")
    assert "layout" not in rows
