"""A request that goes on from a snapshot draws what it would have drawn, bit for bit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hidream_grpc.errors import SnapshotError
from hidream_grpc.model.denoising.snapshots import StateSnapshot
from hidream_grpc.model.denoising.state import DenoisingState
from hidream_grpc.model.parameters import GenerationParameters
from hidream_grpc.model.pipeline import HiDreamModel
from hidream_grpc.model.snapshot_format import SnapshotIdentity, unpack
from tests.numerics.conftest import LoadModel
from tests.support.checkpoints import SCHEDULERS
from tests.support.denoising import denoise, is_denoised, parameters, take_step

NUM_STEPS = 5
VARIANTS = sorted(SCHEDULERS)


def request_of_two(**changes: Any) -> GenerationParameters:
    return parameters(**({"num_images": 2, "num_inference_steps": NUM_STEPS} | changes))


def after_steps(model: HiDreamModel, request: GenerationParameters, num_steps: int) -> DenoisingState:
    state = model.begin(request)
    for _ in range(num_steps):
        take_step(model, [state])
    return state


def packed(model: HiDreamModel, state: DenoisingState) -> bytes:
    return model.pack_snapshot(StateSnapshot.of(state), state.parameters)


# The scheduler of the full variant remembers most; of the others one step early and the last.
@pytest.mark.parametrize(
    ("variant", "step"),
    [
        pytest.param(
            variant, step, marks=[] if variant == "full" or step in (2, NUM_STEPS) else pytest.mark.long
        )
        for variant in VARIANTS
        for step in range(1, NUM_STEPS + 1)
    ],
)
def test_a_request_goes_on_from_any_step_as_if_nothing_had_been(
    variant: str, step: int, model_of: LoadModel
) -> None:
    model, request = model_of(variant), request_of_two()
    undisturbed = denoise(model, request)
    state = after_steps(model, request, step)
    resumed = model.restore(request, packed(model, state))
    assert resumed.step == step
    while not is_denoised(resumed):
        take_step(model, [resumed])
    assert torch.equal(resumed.latents, undisturbed.latents)


def test_a_snapshot_of_latents_that_are_not_finite_is_refused(model_of: LoadModel) -> None:
    model, request = model_of("full"), request_of_two()
    state = after_steps(model, request, 2)
    state.latents = state.latents.clone()
    state.latents[1, 0, 0, 0] = float("nan")
    with pytest.raises(SnapshotError, match="the latents of the snapshot are not finite"):
        model.restore(request, packed(model, state))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_snapshot_stays_as_it_was_when_the_request_goes_on(variant: str, model_of: LoadModel) -> None:
    model, request = model_of(variant), request_of_two()
    state = after_steps(model, request, 2)
    snapshot = StateSnapshot.of(state)
    before = model.pack_snapshot(snapshot, request)
    for _ in range(NUM_STEPS - 2):
        take_step(model, [state])
    assert model.pack_snapshot(snapshot, request) == before


def test_a_snapshot_holds_values_of_the_models_own_dtype(model_of: LoadModel) -> None:
    request = request_of_two()
    snapshot = StateSnapshot.of(after_steps(model_of("full"), request, 2))
    halved = in_half_precision(snapshot)
    identity = SnapshotIdentity(request, "0" * 16)
    read = StateSnapshot.from_bytes(halved.to_bytes(identity), identity, torch.device("cpu"))
    assert read.latents.dtype == torch.bfloat16
    assert torch.equal(read.latents, halved.latents)


def in_half_precision(snapshot: StateSnapshot) -> StateSnapshot:
    latents = snapshot.latents.to(torch.bfloat16)
    return StateSnapshot(snapshot.step, latents, snapshot.history, snapshot.generator_states)


@pytest.mark.parametrize(
    "other",
    [{"width": 96}, {"num_images": 1}, {"num_inference_steps": 1}, {"seed": 8}, {"prompt": "a blue square"}],
    ids=["another size", "fewer images", "fewer steps", "another seed", "another prompt"],
)
def test_a_snapshot_of_another_request_is_refused(other: dict[str, Any], model_of: LoadModel) -> None:
    model = model_of("full")
    data = packed(model, after_steps(model, request_of_two(), 2))
    with pytest.raises(SnapshotError, match="of another request"):
        model.restore(request_of_two(**other), data)


def test_a_snapshot_of_another_checkpoint_is_refused(model_of: LoadModel) -> None:
    full, dev = model_of("full"), model_of("dev")
    data = packed(full, after_steps(full, request_of_two(), 2))
    with pytest.raises(SnapshotError, match=f"of another checkpoint, {full.fingerprint}"):
        dev.restore(request_of_two(), data)


def test_a_snapshot_of_a_device_of_another_precision_is_refused(model_of: LoadModel) -> None:
    model, request = model_of("full"), request_of_two()
    halved = in_half_precision(StateSnapshot.of(after_steps(model, request, 2)))
    with pytest.raises(SnapshotError, match=r"are .+ of torch.bfloat16, not .+ of torch.float32"):
        model.restore(request, model.pack_snapshot(halved, request))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        pytest.param({"scheduler_name": "FlowMatchLCMScheduler"}, "of a FlowMatchLCM", id="scheduler"),
        pytest.param({"model_outputs": ()}, "of order 0, not 2", id="order"),
    ],
)
def test_a_snapshot_of_another_scheduler_is_refused(
    change: dict[str, Any], reason: str, model_of: LoadModel
) -> None:
    model, request = model_of("full"), request_of_two()
    snapshot = StateSnapshot.of(after_steps(model, request, 2))
    other = replace(snapshot, history=replace(snapshot.history, **change))
    with pytest.raises(SnapshotError, match=reason):
        model.restore(request, model.pack_snapshot(other, request))


def test_a_snapshot_of_another_kind_of_generator_is_refused(model_of: LoadModel) -> None:
    model, request = model_of("full"), request_of_two()
    snapshot = StateSnapshot.of(after_steps(model, request, 2))
    other = replace(snapshot, generator_states=(torch.zeros(8, dtype=torch.uint8),) * 2)
    with pytest.raises(SnapshotError, match="generator"):
        model.restore(request, model.pack_snapshot(other, request))


@pytest.fixture(scope="module")
def real_snapshot(model_of: LoadModel) -> tuple[bytes, SnapshotIdentity]:
    """One with all that a scheduler can remember, and what it belongs to."""
    model, request = model_of("full"), request_of_two()
    return packed(model, after_steps(model, request, 3)), SnapshotIdentity(request, model.fingerprint)


@given(data=st.data())
def test_any_flipped_bit_is_noticed(
    real_snapshot: tuple[bytes, SnapshotIdentity], data: st.DataObject
) -> None:
    snapshot, identity = real_snapshot
    bit = data.draw(st.integers(0, 8 * len(snapshot) - 1), "bit")
    altered = bytearray(snapshot)
    altered[bit // 8] ^= 1 << bit % 8
    with pytest.raises(SnapshotError):
        unpack(bytes(altered), identity)


@given(data=st.data())
def test_any_missing_or_added_part_is_noticed(
    real_snapshot: tuple[bytes, SnapshotIdentity], data: st.DataObject
) -> None:
    snapshot, identity = real_snapshot
    length = data.draw(st.integers(0, len(snapshot) - 1), "length")
    for other in (snapshot[:length], snapshot[length + 1 :], snapshot + snapshot[length:]):
        with pytest.raises(SnapshotError):
            unpack(other, identity)


def test_a_whole_snapshot_is_read(real_snapshot: tuple[bytes, SnapshotIdentity]) -> None:
    assert unpack(*real_snapshot).step == 3
