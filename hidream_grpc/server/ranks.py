"""From the operator's settings to a rank group."""

from __future__ import annotations

import os
from pathlib import Path

from hidream_grpc.devices.detect import DeviceSelection, detect, parse_devices, select_devices
from hidream_grpc.devices.device_types import CPU
from hidream_grpc.devices.host_memory import host_memory
from hidream_grpc.engine.group.config import GroupConfig, GroupTimeouts
from hidream_grpc.logs import LogConfig
from hidream_grpc.model.checkpoint.description import CheckpointDescription
from hidream_grpc.model.checkpoint.step_shapes import choose_compile_shapes
from hidream_grpc.model.memory_requirements import MemoryRequirements
from hidream_grpc.model.model_weights import read_model_weights
from hidream_grpc.model.parallel.layout import Layout
from hidream_grpc.model.parallel.planner import LAYOUT_FLAG, ModelDivisions, choose_layout, smaller_layouts
from hidream_grpc.settings import Settings


def group_config(settings: Settings, model_path: Path, checkpoint: CheckpointDescription) -> GroupConfig:
    """The ranks that the settings ask for.

    Raises:
        StartupError: a device, a layout or a shape that cannot be, or has no room.
    """
    divisions = ModelDivisions(checkpoint.num_attention_heads, checkpoint.num_routed_experts)
    devices, layout = _plan(settings, divisions)
    device_type = devices.device_type
    requirements = MemoryRequirements(
        read_model_weights(model_path, settings.extra_model_path), divisions, device_type
    )
    if device_type is CPU:
        # Other devices tell their memory when a rank has opened them, before it loads.
        host = host_memory()
        requirements.check(layout, dict.fromkeys(range(layout.world_size), host), host)
    cores_per_rank = len(os.sched_getaffinity(0)) // layout.world_size
    return GroupConfig(
        model_path=model_path,
        extra_model_path=settings.extra_model_path,
        checkpoint_fingerprint=checkpoint.fingerprint,
        devices=devices,
        layout=layout,
        smaller_layouts=smaller_layouts(layout, divisions),
        start_method=device_type.start_method,
        check_memory=requirements.check,
        # Proven on gloo; an experiment where the backend holds state in the device.
        replace=settings.replace or ("one" if device_type.backend == "gloo" else "all"),
        threads_per_rank=settings.threads_per_rank or max(1, cores_per_rank),
        compile_shapes=choose_compile_shapes(settings.compile_shapes, device_type, checkpoint.size_limits),
        timeouts=GroupTimeouts(
            load_seconds=settings.load_timeout_seconds,
            collective_seconds=settings.collective_timeout_seconds,
        ),
        log=LogConfig(settings.log_level, settings.log_format, settings.log_file),
    )


def _plan(settings: Settings, divisions: ModelDivisions) -> tuple[DeviceSelection, Layout]:
    """The devices that the ranks may use, and how these share the work; the layout may leave some idle."""
    device_type = detect(settings.device_type)
    named = parse_devices(settings.devices) if settings.devices is not None else None
    layout = choose_layout(
        settings.layout,
        num_devices=len(named) if named is not None else None,
        default=device_type.default_layout,
        divisions=divisions,
    )
    if named is not None:
        return select_devices(device_type, named), layout
    return select_devices(device_type, tuple(range(layout.world_size)), LAYOUT_FLAG), layout
