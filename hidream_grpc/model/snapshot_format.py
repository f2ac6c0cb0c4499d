"""The bytes of a snapshot, which hold a request in the middle of its denoising, for any process and layout.

    version │ SHA-256 of the rest │ msgspec message: the identity, and the tensors as raw bytes

A snapshot is no pickle, so reading it runs no code of its writer. A snapshot that is altered, cut, or of
another version, request or checkpoint is refused, and its request then starts from its seed.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import msgspec

from hidream_grpc.errors import SnapshotError
from hidream_grpc.model.parameters import GenerationParameters

SNAPSHOT_VERSION = 2

_HEADER = b"hidream snapshot %d\n" % SNAPSHOT_VERSION
_DIGEST_BYTES = hashlib.sha256().digest_size
_ITEM_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class SnapshotIdentity:
    """The request and checkpoint of a snapshot; with any other it would lead to a wrong image.

    Attributes:
        parameters: parameters of the request.
        checkpoint_fingerprint: fingerprint of the checkpoint that generates its images.
    """

    parameters: GenerationParameters
    checkpoint_fingerprint: str


class PackedTensor(msgspec.Struct, frozen=True, array_like=True):
    """A tensor: `dtype` is torch's name for it, `data` is in the byte order of the machine."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


class PackedSnapshot(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """The state of a request after one of its denoising steps.

    Attributes:
        step: number of denoising steps done.
        latents: (N, C, H, W).
        generator_states: one for each image.
        scheduler_name: class of the scheduler in diffusers.
        model_outputs: the latest outputs, which a multistep scheduler uses, oldest first; None for those that
            are not there yet.
        last_sample: the sample that the scheduler corrects in the next step.
        lower_order_nums: number of the scheduler's steps so far, up to its order.
        this_order: order of the scheduler's latest step.
    """

    step: int
    latents: PackedTensor
    generator_states: tuple[bytes, ...]
    scheduler_name: str
    model_outputs: tuple[PackedTensor | None, ...] = ()
    last_sample: PackedTensor | None = None
    lower_order_nums: int = 0
    this_order: int = 0


class _Labelled(msgspec.Struct, frozen=True, array_like=True):
    request_digest: bytes
    checkpoint_fingerprint: str
    snapshot: PackedSnapshot


_decoder = msgspec.msgpack.Decoder(_Labelled)


def pack(snapshot: PackedSnapshot, identity: SnapshotIdentity) -> bytes:
    """Pack a snapshot of this request into bytes."""
    labelled = _Labelled(identity.parameters.digest, identity.checkpoint_fingerprint, snapshot)
    content = msgspec.msgpack.encode(labelled)
    return b"".join((_HEADER, hashlib.sha256(content).digest(), content))


def unpack(data: bytes, identity: SnapshotIdentity) -> PackedSnapshot:
    """Read the snapshot in these bytes.

    Raises:
        SnapshotError: the bytes are not whole, are of another version, request or checkpoint, or hold a step,
            shape or dtype that this request cannot have.
    """
    if not data.startswith(_HEADER):
        raise SnapshotError(f"not a snapshot of version {SNAPSHOT_VERSION}")
    content = memoryview(data)[len(_HEADER) + _DIGEST_BYTES :]
    if hashlib.sha256(content).digest() != data[len(_HEADER) : len(_HEADER) + _DIGEST_BYTES]:
        raise SnapshotError("the snapshot is altered or cut")
    try:
        labelled = _decoder.decode(content)
    except msgspec.DecodeError as error:
        raise SnapshotError(f"not a snapshot: {error}") from error
    if labelled.request_digest != identity.parameters.digest:
        raise SnapshotError("the snapshot is of another request")
    if labelled.checkpoint_fingerprint != identity.checkpoint_fingerprint:
        raise SnapshotError(f"the snapshot is of another checkpoint, {labelled.checkpoint_fingerprint}")
    _check(labelled.snapshot, identity.parameters)
    return labelled.snapshot


def _check(snapshot: PackedSnapshot, parameters: GenerationParameters) -> None:
    if not 0 < snapshot.step <= parameters.num_inference_steps:
        raise SnapshotError(f"the snapshot is of step {snapshot.step} of {parameters.num_inference_steps}")
    shape = snapshot.latents.shape
    if not _fits(shape, parameters):
        raise SnapshotError(f"the latents of the snapshot are of shape {shape}")
    for tensor in filter(None, (snapshot.latents, *snapshot.model_outputs, snapshot.last_sample)):
        size_bytes = math.prod(shape) * _ITEM_BYTES.get(tensor.dtype, 0)
        if tensor.shape != shape or not size_bytes or len(tensor.data) != size_bytes:
            raise SnapshotError(f"{len(tensor.data)} bytes of {tensor.dtype} for {tensor.shape}, not {shape}")
    if len(snapshot.generator_states) != parameters.num_images:
        num_states = len(snapshot.generator_states)
        raise SnapshotError(f"{num_states} generators for {parameters.num_images} images")


def _fits(shape: tuple[int, ...], parameters: GenerationParameters) -> bool:
    """Whether latents of this shape are those of the request's images, with one scale for both sides."""
    if len(shape) != 4 or min(shape) < 1 or shape[0] != parameters.num_images:
        return False
    factor = parameters.height // shape[2]
    return (shape[2] * factor, shape[3] * factor) == (parameters.height, parameters.width)
