"""A request that goes on from a snapshot draws what it would have drawn, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hidream_grpc.model.denoising import DenoisingState
from hidream_grpc.model.parameters import GenerationParameters
from hidream_grpc.model.pipeline import HiDreamModel
from hidream_grpc.model.snapshot_format import SnapshotError, pack, unpack
from hidream_grpc.model.snapshots import Snapshot
from tests.checkpoints import SCHEDULERS
from tests.denoising import denoise, parameters, take_step
from tests.numerics.conftest import LoadModel

NUM_STEPS = 5
VARIANTS = sorted(SCHEDULERS)


def request_of_two(**changes: Any) -> GenerationParameters:
    return parameters(**({"num_images": 2, "num_inference_steps": NUM_STEPS} | changes))


def after_steps(model: HiDreamModel, request: GenerationParameters, num_steps: int) -> DenoisingState:
    state = model.begin(request)
    for _ in range(num_steps):
        take_step(model, [state])
    return state


@pytest.mark.parametrize("step", range(NUM_STEPS + 1))
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_request_goes_on_from_any_step_as_if_nothing_had_been(
    variant: str, step: int, model_of: LoadModel
) -> None:
    model, request = model_of(variant), request_of_two()
    undisturbed = denoise(model, request)
    state = after_steps(model, request, step)
    data = Snapshot.of(state).to_bytes()
    resumed = model.restore(request, data)
    assert resumed.step == step
    while not resumed.is_denoised:
        take_step(model, [resumed])
    assert torch.equal(resumed.latents, undisturbed.latents)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_snapshot_stays_as_it_was_when_the_request_goes_on(variant: str, model_of: LoadModel) -> None:
    model, request = model_of(variant), request_of_two()
    state = after_steps(model, request, 2)
    snapshot = Snapshot.of(state)
    before = snapshot.to_bytes()
    for _ in range(NUM_STEPS - 2):
        take_step(model, [state])
    assert snapshot.to_bytes() == before


def test_a_snapshot_holds_values_of_the_models_own_dtype(model_of: LoadModel) -> None:
    snapshot = Snapshot.of(after_steps(model_of("full"), request_of_two(), 2))
    exact = snapshot.latents.to(torch.bfloat16)
    halved = Snapshot(snapshot.step, exact, snapshot.history, snapshot.generator_states)
    read = Snapshot.from_bytes(halved.to_bytes(), torch.device("cpu"))
    assert read.latents.dtype == torch.bfloat16
    assert torch.equal(read.latents, exact)


@pytest.mark.parametrize(
    ("other", "reason"),
    [({"width": 96}, "latents"), ({"num_images": 1}, "latents"), ({"num_inference_steps": 1}, "step 2 of 1")],
    ids=["another size", "fewer images", "fewer steps"],
)
def test_a_snapshot_of_another_request_is_refused(
    other: dict[str, Any], reason: str, model_of: LoadModel
) -> None:
    model = model_of("full")
    data = Snapshot.of(after_steps(model, request_of_two(), 2)).to_bytes()
    with pytest.raises(SnapshotError, match=reason):
        model.restore(request_of_two(**other), data)


def test_a_snapshot_of_another_scheduler_is_refused(model_of: LoadModel) -> None:
    data = Snapshot.of(after_steps(model_of("full"), request_of_two(), 2)).to_bytes()
    with pytest.raises(SnapshotError, match="UniPCMultistepScheduler, not FlowMatch"):
        model_of("dev").restore(request_of_two(), data)


def test_bytes_that_are_no_snapshot_of_this_version_are_refused(model_of: LoadModel) -> None:
    data = Snapshot.of(after_steps(model_of("full"), request_of_two(), 1)).to_bytes()
    with pytest.raises(SnapshotError, match="not a snapshot"):
        unpack(data[:-1])
    newer = type(unpack(data))(
        **{name: getattr(unpack(data), name) for name in unpack(data).__struct_fields__} | {"version": 2}
    )
    with pytest.raises(SnapshotError, match="version 2"):
        unpack(pack(newer))
