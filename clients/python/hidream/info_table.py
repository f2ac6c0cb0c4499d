"""A server as text for people."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from hidream.terminal import table
from hidream.v1 import server_info_pb2


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
    if info.weights:
        yield "weights", f"{info.weights}, of text encoders {info.text_encoder_weights}"
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
    if model.trained_prompt_tokens:
        yield "trained prompts", f"up to {model.trained_prompt_tokens} tokens"
    for field, value in limits.ListFields():
        yield field.name, _limit(value)
    yield (
        "versions",
        ", ".join(f"{field.name} {value}" for field, value in info.versions.ListFields()),
    )


def _limit(value: float | Mapping[str, int]) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {number:,}" for name, number in sorted(value.items()))
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def _sizes(sizes: Iterable[server_info_pb2.ImageSize]) -> str:
    return ", ".join(f"{size.width}×{size.height}" for size in sizes)


def _memory(device: server_info_pb2.DeviceInfo) -> str:
    if not device.total_memory_bytes:
        return ""
    return f", {device.free_memory_bytes / 2**30:.1f} of {device.total_memory_bytes / 2**30:.1f} GiB free"
