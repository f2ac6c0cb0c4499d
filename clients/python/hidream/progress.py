"""What a person sees of a job that runs: a bar on a terminal, a few lines in a log."""

from __future__ import annotations

import sys
from typing import Self

import typer
from tqdm import tqdm

from hidream.events import Event, ImageFinished, Progress, Queued, Restarted, Started, Succeeded
from hidream.terminal import format_seconds

_BAR_FORMAT = "{desc:<12} {percentage:3.0f}% |{bar}| step {n_fmt} of {total_fmt}{postfix}"
_WAITING_FORMAT = "{desc}{postfix}"
_NUM_LINES = 4
_CONNECTION_LOST = "connection lost, trying again"


class ProgressBar:
    """One line on stderr with the state of a request, as the server reports it."""

    def __init__(self, is_shown: bool = True) -> None:
        # Every step is shown when it ends, however short; tqdm would skip some.
        self._bar = tqdm(
            disable=not is_shown,
            mininterval=0,
            miniters=1,
            dynamic_ncols=True,
            bar_format=_WAITING_FORMAT,
            desc="connecting",
        )
        self._num_images = 1
        self._num_received = 0
        self._step_time = ""
        self._summary = ""
        self._is_lost = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        if self._summary:
            self._bar.write(self._summary, file=sys.stderr)

    def show(self, event: Event) -> None:
        """Take the next event."""
        self._is_lost = False
        match event:
            case Queued():
                self._describe(_queued_text(event))
            case Started():
                self._num_images = event.spec.num_images
                self._bar.total = event.spec.num_inference_steps
                self._bar.bar_format = _BAR_FORMAT
                self._describe("drawing")
            case Progress():
                self._bar.n = event.step
                self._bar.total = event.total_steps
                # For a reader that joins late, or comes back, a step is the first event.
                self._bar.bar_format = _BAR_FORMAT
                self._bar.set_description_str("drawing", refresh=False)
                self._step_time = _step_time(event)
                self._bar.set_postfix_str(self._step_time + _time_left(event))
            case Restarted():
                self._bar.n = event.resumed_from_step
                self._describe("drawing")
                if not self._bar.disable:
                    self._bar.write(_restarted_text(event), file=sys.stderr)
            case ImageFinished():
                self._num_received += 1
                self._describe(f"image {self._num_received}/{self._num_images}")
            case Succeeded():
                # Nothing is left, whatever was estimated last.
                self._bar.set_postfix_str(self._step_time, refresh=False)
                self._describe("done")
                self._summary = "" if self._bar.disable else summary_line(event)

    def show_connection_lost(self, going_on: str) -> None:
        """Say that the events have stopped for a while, and once for all attempts how else to go on."""
        if not (self._is_lost or self._bar.disable):
            self._bar.write(f"{_CONNECTION_LOST}; {going_on}", file=sys.stderr)
        self._is_lost = True
        self._describe(_CONNECTION_LOST)

    def _describe(self, text: str) -> None:
        self._bar.set_description_str(text)


class ProgressLines:
    """Lines on stderr, for a log file: a change of the state, the first step, and each further quarter."""

    def __init__(self) -> None:
        self._text = ""
        self._quarter = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def show(self, event: Event) -> None:
        """Take the next event."""
        match event:
            case Queued():
                self._say(_queued_text(event))
            case Progress():
                quarter = event.step * _NUM_LINES // event.total_steps
                if quarter > self._quarter:
                    self._say(
                        f"step {event.step} of {event.total_steps}, {_step_time(event)}{_time_left(event)}"
                    )
                self._quarter = max(self._quarter, quarter)
            case Restarted():
                self._quarter = -1
                self._say(_restarted_text(event))
            case Succeeded():
                self._say(summary_line(event))

    def show_connection_lost(self, going_on: str) -> None:
        """Say that the events have stopped for a while, and how else to go on; once for all attempts."""
        self._say(f"{_CONNECTION_LOST}; {going_on}")

    def _say(self, text: str) -> None:
        if text != self._text:
            typer.echo(text, err=True)
        self._text = text


def progress_display(is_shown: bool) -> ProgressBar | ProgressLines:
    """Return what shows the progress: a bar on a terminal, lines elsewhere, nothing where none is wanted."""
    return ProgressLines() if is_shown and not sys.stderr.isatty() else ProgressBar(is_shown)


def summary_line(succeeded: Succeeded) -> str:
    """Return one line with the parameters and the time of each stage."""
    spec, timings = succeeded.job.spec, succeeded.timings
    return (
        f"seed {spec.seed}, {spec.width}×{spec.height}, {spec.num_inference_steps} steps, "
        f"guidance {spec.guidance_scale:g}: {format_seconds(timings.total_seconds)} "
        f"(queue {format_seconds(timings.queue_seconds)}, encode {format_seconds(timings.encode_seconds)}, "
        f"denoise {format_seconds(timings.denoise_seconds)}, decode {format_seconds(timings.decode_seconds)})"
    )


def _queued_text(queued: Queued) -> str:
    wait = queued.estimated_wait_seconds
    expected = "" if wait is None else f", about {format_seconds(wait)} to wait"
    return f"queued, position {queued.queue_position}{expected}"


def _step_time(progress: Progress) -> str:
    return f"{format_seconds(progress.step_seconds)} a step"


def _time_left(progress: Progress) -> str:
    remaining_seconds = progress.estimated_remaining_seconds
    return f", {format_seconds(remaining_seconds)} left" if remaining_seconds else ""


def _restarted_text(restarted: Restarted) -> str:
    return (
        f"attempt {restarted.attempt}: {restarted.reason}; goes on after step {restarted.resumed_from_step}"
    )
