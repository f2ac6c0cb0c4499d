"""What a person sees: a progress bar that moves with the events, and a table of the server."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Self

from tqdm import tqdm

from hidream.errors import ServerError
from hidream.events import Event, ImageFinished, Progress, Queued, Restarted, Started, Succeeded
from hidream.v1 import server_info_pb2

_BAR_FORMAT = "{desc:<12} {percentage:3.0f}% |{bar}| step {n_fmt} of {total_fmt}{postfix}"
_WAITING_FORMAT = "{desc}{postfix}"


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
        self._summary = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        if self._summary:
            self._bar.write(self._summary, file=sys.stderr)

    def show(self, event: Event) -> None:
        """Take the next event."""
        match event:
            case Queued():
                wait = event.estimated_wait_seconds
                expected = "" if wait is None else f", about {format_seconds(wait)} to wait"
                self._describe(f"queued, position {event.queue_position}{expected}")
            case Started():
                self._num_images = event.spec.num_images
                self._bar.total = event.spec.num_inference_steps
                self._bar.bar_format = _BAR_FORMAT
                self._describe("drawing")
            case Progress():
                self._show_step(event)
            case Restarted():
                self._bar.n = event.resumed_from_step
                self._describe("drawing")
                self._say(
                    f"attempt {event.attempt}: {event.reason}; goes on after step {event.resumed_from_step}"
                )
            case ImageFinished():
                self._num_received += 1
                self._describe(f"image {self._num_received}/{self._num_images}")
            case Succeeded():
                self._describe("done")
                self._summary = "" if self._bar.disable else summary_line(event)

    def show_connection_lost(self, error: ServerError) -> None:
        """Say that the events have stopped for a while; the next one goes on where they did."""
        self._describe("connection lost, trying again")

    def _show_step(self, progress: Progress) -> None:
        postfix = f"{format_seconds(progress.step_seconds)} a step"
        if progress.estimated_remaining_seconds:
            postfix += f", {format_seconds(progress.estimated_remaining_seconds)} left"
        self._bar.n = progress.step
        self._bar.total = progress.total_steps
        # For a reader that joins late, or comes back, a step is the first event.
        self._bar.bar_format = _BAR_FORMAT
        self._bar.set_description_str("drawing", refresh=False)
        self._bar.set_postfix_str(postfix)

    def _say(self, line: str) -> None:
        if not self._bar.disable:
            self._bar.write(line, file=sys.stderr)

    def _describe(self, text: str) -> None:
        self._bar.set_description_str(text)


def format_seconds(seconds: float) -> str:
    """Return a duration for people: `85 ms`, `3.2 s`, `2 min 5 s`."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 59.95:  # what would read 60.0 s is a minute
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s"


def summary_line(succeeded: Succeeded) -> str:
    """Return one line with the parameters and the time of each stage."""
    spec, timings = succeeded.job.spec, succeeded.timings
    return (
        f"seed {spec.seed}, {spec.width}×{spec.height}, {spec.num_inference_steps} steps, "
        f"guidance {spec.guidance_scale:g}: {format_seconds(timings.total_seconds)} "
        f"(queue {format_seconds(timings.queue_seconds)}, encode {format_seconds(timings.encode_seconds)}, "
        f"denoise {format_seconds(timings.denoise_seconds)}, decode {format_seconds(timings.decode_seconds)})"
    )


def table(rows: Iterable[tuple[str, str]]) -> str:
    """Return one fact a line; those without a value are left out."""
    rows = [row for row in rows if row[1]]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def info_table(info: server_info_pb2.ServerInfo) -> str:
    """Return a description of the server, one fact a line."""
    return table(_info_rows(info))


def _info_rows(info: server_info_pb2.ServerInfo) -> Iterator[tuple[str, str]]:
    model, jobs, limits, defaults = info.model, info.jobs, info.limits, info.defaults
    state = server_info_pb2.ServerState.Name(info.state).removeprefix("SERVER_STATE_")
    yield "state", state
    yield "since", f"{info.start_time.ToDatetime():%Y-%m-%d %H:%M:%S} UTC"
    yield "model", f"{model.name} ({model.variant}, {model.num_parameters:,} weights)"
    yield "fingerprint", model.fingerprint
    yield "scheduler", f"{model.scheduler}, shift {model.shift:g}"
    yield "live models", ", ".join(live.name for live in info.live_models)
    yield "layout", info.layout
    for device in info.devices:
        yield f"rank {device.rank}", f"{device.device_type}: {device.name}{_memory(device)}"
    yield "idle devices", ", ".join(str(device) for device in info.idle_devices)
    yield "rank group", f"generation {info.generation}, {info.num_rank_restarts} ranks replaced"
    yield (
        "jobs",
        f"{jobs.queued} queued, {jobs.running} running; here since the start: {jobs.total} accepted, "
        f"{jobs.succeeded} succeeded, {jobs.failed} failed, {jobs.cancelled} cancelled",
    )
    yield (
        "defaults",
        f"{defaults.width}×{defaults.height}, {defaults.num_inference_steps} steps, "
        f"guidance {defaults.guidance_scale:g}, {defaults.num_images} image, quality {defaults.quality}",
    )
    yield "sizes", _sizes(info.recommended_sizes)
    yield "further sizes", _sizes(info.supported_sizes)
    yield "warnings", "; ".join(model.warnings)
    for field, value in limits.ListFields():
        yield field.name, f"{value:,}" if isinstance(value, int) else f"{value:g}"
    yield (
        "versions",
        ", ".join(f"{field.name} {value}" for field, value in info.versions.ListFields()),
    )


def _sizes(sizes: Iterable[server_info_pb2.ImageSize]) -> str:
    return ", ".join(f"{size.width}×{size.height}" for size in sizes)


def _memory(device: server_info_pb2.DeviceInfo) -> str:
    if not device.total_memory_bytes:
        return ""
    return f", {device.free_memory_bytes / 2**30:.1f} of {device.total_memory_bytes / 2**30:.1f} GiB free"
