"""Snapshots of jobs as the engine hands them up, without an engine."""

from __future__ import annotations

from hidream_grpc.model.snapshot_format import PackedSnapshot, PackedTensor, pack


def packed_snapshot(step: int) -> bytes:
    """What a job can go on from after a step."""
    return pack(
        PackedSnapshot(
            step=step,
            latents=PackedTensor("float32", (1, 1, 1, 1), bytes(4)),
            generator_states=(b"",),
            scheduler_name="FlowMatchLCMScheduler",
        )
    )
