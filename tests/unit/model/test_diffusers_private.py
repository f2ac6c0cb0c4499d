"""The installed diffusers has the internals that a rank depends on; an import finds its classes."""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)

from hidream_grpc.model import diffusers_private
from hidream_grpc.model.denoising.schedulers import new_scheduler


def prototypes() -> list[SchedulerMixin]:
    """A scheduler of each class, as the released checkpoints configure it."""
    unipc = UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
    return [unipc, FlowMatchLCMScheduler(shift=6.0), FlowMatchEulerDiscreteScheduler(shift=3.0)]


@pytest.mark.parametrize("prototype", prototypes(), ids=lambda prototype: type(prototype).__name__)
def test_a_scheduler_goes_on_after_the_steps_that_it_is_set_to(prototype: SchedulerMixin) -> None:
    scheduler = new_scheduler(prototype, 4, 4096)
    diffusers_private.set_steps_done(scheduler, 2)
    assert scheduler.step_index == 2
    diffusers_private.set_steps_done(scheduler, 0)
    assert scheduler.step_index is None
    assert scheduler.begin_index == 0


def test_unipc_keeps_its_history_where_snapshots_read_it() -> None:
    scheduler = new_scheduler(prototypes()[0], 4, 4096)
    before = set(vars(scheduler))
    latents = torch.ones(1, 4, 2, 2)
    for timestep in scheduler.timesteps[:2]:
        latents = scheduler.step(latents, timestep, latents, return_dict=False)[0]
    assert before >= {"model_outputs", "timestep_list", "last_sample", "lower_order_nums"}
    assert set(vars(scheduler)) - before == {"this_order"}


def test_the_shift_of_a_schedule_depends_on_the_number_of_tokens_alone() -> None:
    assert diffusers_private.calculate_shift(256) == pytest.approx(0.5)
    assert diffusers_private.calculate_shift(4096) == pytest.approx(1.15)
