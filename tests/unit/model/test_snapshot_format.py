"""Snapshots that are complete but of another request, or impossible for this one, are refused."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from hidream_grpc.errors import SnapshotError
from hidream_grpc.model.parameters import GenerationParameters
from hidream_grpc.model.snapshot_format import (
    PackedSnapshot,
    PackedTensor,
    SnapshotIdentity,
    pack,
    unpack,
)

IDENTITY = SnapshotIdentity(
    GenerationParameters(
        prompt="a red circle",
        width=64,
        height=96,
        num_inference_steps=9,
        guidance_scale=3.0,
        num_images=2,
        seed=7,
    ),
    "86637e71f35d8ddd",
)
SHAPE = (2, 16, 12, 8)
TENSOR = PackedTensor("bfloat16", SHAPE, bytes(2 * 2 * 16 * 12 * 8))
SNAPSHOT = PackedSnapshot(
    step=4,
    latents=TENSOR,
    generator_states=(b"first", b"second"),
    scheduler_name="UniPCMultistepScheduler",
    model_outputs=(None, TENSOR),
    last_sample=TENSOR,
)


def tensor(dtype: str, *shape: int, num_bytes: int) -> PackedTensor:
    return PackedTensor(dtype, shape, bytes(num_bytes))


def test_a_snapshot_is_read_as_it_was_written() -> None:
    assert unpack(pack(SNAPSHOT, IDENTITY), IDENTITY) == SNAPSHOT


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({name: value}, id=name)
        for name, value in {
            "prompt": "a red circlE",
            "negative_prompt": "blue",
            "width": 96,
            "height": 64,
            "num_inference_steps": 8,
            "guidance_scale": 3.0000001,
            "num_images": 1,
            "seed": 8,
        }.items()
    ],
)
def test_a_snapshot_of_another_request_is_refused(change: dict[str, Any]) -> None:
    other = replace(IDENTITY, parameters=msgspec.structs.replace(IDENTITY.parameters, **change))
    with pytest.raises(SnapshotError, match="of another request"):
        unpack(pack(SNAPSHOT, IDENTITY), other)


def test_a_snapshot_of_another_checkpoint_is_refused() -> None:
    with pytest.raises(SnapshotError, match="of another checkpoint, 86637e71f35d8ddd"):
        unpack(pack(SNAPSHOT, IDENTITY), replace(IDENTITY, checkpoint_fingerprint="0" * 16))


def test_a_request_that_travelled_is_the_same_request() -> None:
    parameters = msgspec.structs.replace(IDENTITY.parameters, guidance_scale=3)
    for codec in (msgspec.json, msgspec.msgpack):
        travelled = codec.decode(codec.encode(parameters), type=GenerationParameters)
        assert travelled.digest == parameters.digest == IDENTITY.parameters.digest


def test_the_length_of_the_prompts_follows_from_the_request_and_the_checkpoint() -> None:
    parameters = msgspec.structs.replace(IDENTITY.parameters, prompt_tokens=256)
    assert parameters.digest == IDENTITY.parameters.digest
    # As before there was that length: jobs go on from their snapshots after an upgrade.
    asked = (
        {"prompt": "a red circle", "negative_prompt": "", "width": 64, "height": 96}
        | {"num_inference_steps": 9, "guidance_scale": 3.0, "num_images": 2, "seed": 7}
        | {"output_format": "PNG", "quality": 90, "with_previews": False}
    )
    assert parameters.digest == hashlib.sha256(msgspec.msgpack.encode(asked)).digest()


@pytest.mark.parametrize(
    "data",
    [b"", b"of another version", msgspec.msgpack.encode((1, 4)), pack(SNAPSHOT, IDENTITY)[:-1]],
    ids=["nothing", "something else", "version 1", "cut"],
)
def test_bytes_that_are_no_whole_snapshot_of_this_version_are_refused(data: bytes) -> None:
    with pytest.raises(SnapshotError, match=r"not a snapshot of version 2|altered or cut"):
        unpack(data, IDENTITY)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        pytest.param({"step": 0}, "step 0 of 9", id="before the first step"),
        pytest.param({"step": 10}, "step 10 of 9", id="beyond the last step"),
        pytest.param({"latents": tensor("bfloat16", 1, 16, 12, 8, num_bytes=3072)}, "shape", id="images"),
        pytest.param({"latents": tensor("bfloat16", 2, 16, 8, 12, num_bytes=6144)}, "shape", id="turned"),
        pytest.param({"latents": tensor("bfloat16", 2, 16, 12, 4, num_bytes=3072)}, "shape", id="narrower"),
        pytest.param({"latents": tensor("bfloat16", 2, 16, 96, num_bytes=6144)}, "shape", id="flat"),
        pytest.param({"latents": tensor("bfloat16", 2, 16, 0, 0, num_bytes=0)}, "shape", id="empty"),
        pytest.param({"latents": tensor("float32", *SHAPE, num_bytes=6144)}, "6144 bytes of", id="too short"),
        pytest.param({"latents": tensor("int64", *SHAPE, num_bytes=24576)}, "of int64", id="integers"),
        pytest.param({"latents": tensor("load", *SHAPE, num_bytes=0)}, "of load", id="no dtype"),
        pytest.param(
            {"last_sample": tensor("bfloat16", 1, 16, 12, 8, num_bytes=3072)}, "not", id="history of another"
        ),
        pytest.param({"generator_states": (b"first",)}, "1 generators for 2 images", id="generators"),
    ],
)
def test_what_no_snapshot_of_the_request_can_be_is_refused(change: dict[str, Any], reason: str) -> None:
    odd = msgspec.structs.replace(SNAPSHOT, **change)
    with pytest.raises(SnapshotError, match=reason):
        unpack(pack(odd, IDENTITY), IDENTITY)
