"""Snapshots of jobs as the engine hands them up, without an engine."""

from __future__ import annotations

from hidream_grpc.model.parameters import GenerationParameters
from hidream_grpc.model.snapshot_format import PackedSnapshot, PackedTensor, SnapshotIdentity, pack

CHECKPOINT_FINGERPRINT = "86637e71f35d8ddd"


def packed_snapshot(
    step: int, parameters: GenerationParameters, checkpoint_fingerprint: str = CHECKPOINT_FINGERPRINT
) -> bytes:
    """What a request can go on from after a step."""
    shape = (parameters.num_images, 1, parameters.height // 8, parameters.width // 8)
    num_bytes = 4 * parameters.num_images * shape[2] * shape[3]
    return pack(
        PackedSnapshot(
            step=step,
            latents=PackedTensor("float32", shape, bytes(num_bytes)),
            generator_states=(b"",) * parameters.num_images,
            scheduler_name="FlowMatchLCMScheduler",
        ),
        SnapshotIdentity(parameters, checkpoint_fingerprint),
    )
