"""The bytes of a snapshot: what a request in the middle of its denoising is, anywhere. Torch-free.

A message of msgspec with its tensors as raw bytes, never a pickle: reading one runs no code of its
writer. Another version of the format is refused, and its request then starts from its seed.
"""

from __future__ import annotations

import msgspec

SNAPSHOT_VERSION = 1


class SnapshotError(ValueError):
    """These bytes are no snapshot of this version, or not one of this request."""


class PackedTensor(msgspec.Struct, frozen=True, array_like=True):
    """A tensor; dtype is torch's name of it, data in the byte order of the machine."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


class PackedSnapshot(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """A request after one of its denoising steps.

    Attributes:
        step: denoising steps done.
        latents: (N, C, H, W).
        generator_states: one for each image.
        scheduler_name: class of the scheduler in diffusers.
        model_outputs: that a multistep scheduler looks back on, oldest first; None before there were any.
        last_sample: that it corrects in the next step.
        lower_order_nums: its steps so far, up to its order.
        this_order: of its latest step.
    """

    version: int = SNAPSHOT_VERSION
    step: int
    latents: PackedTensor
    generator_states: tuple[bytes, ...]
    scheduler_name: str
    model_outputs: tuple[PackedTensor | None, ...] = ()
    last_sample: PackedTensor | None = None
    lower_order_nums: int = 0
    this_order: int = 0


_decoder = msgspec.msgpack.Decoder(PackedSnapshot)


def pack(snapshot: PackedSnapshot) -> bytes:
    """The bytes of a snapshot."""
    return msgspec.msgpack.encode(snapshot)


def unpack(data: bytes) -> PackedSnapshot:
    """The snapshot in these bytes.

    Raises:
        SnapshotError: they are none, or one of another version.
    """
    try:
        snapshot = _decoder.decode(data)
    except msgspec.DecodeError as error:
        raise SnapshotError(f"not a snapshot: {error}") from error
    if snapshot.version != SNAPSHOT_VERSION:
        raise SnapshotError(f"a snapshot of version {snapshot.version}, not {SNAPSHOT_VERSION}")
    return snapshot
