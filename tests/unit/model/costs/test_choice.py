from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hidream_grpc.devices.device_types import CUDA, DeviceMemory
from hidream_grpc.model.checkpoint.hidream_i1 import HIDREAM_I1
from hidream_grpc.model.checkpoint.sizes import ImageSize, SizeLimits
from hidream_grpc.model.costs.choice import ORDERS, LayoutChooser, RatedLayout, unbeaten
from hidream_grpc.model.costs.model import ModelCosts, Workload
from hidream_grpc.model.memory_requirements import MemoryRequirements
from hidream_grpc.model.parallel.layout import Layout
from hidream_grpc.model.parallel.planner import LayoutWord, ModelDivisions, check_layout, plan_layout

LARGE = DeviceMemory(10**12, 10**12)


def chooser(*, has_guidance: bool = True) -> LayoutChooser:
    workload = Workload.new(
        ImageSize(1024, 1024), SizeLimits(16, 1024 * 1024), 8 * 1024 * 1024, CUDA, has_guidance=has_guidance
    )
    return LayoutChooser(MemoryRequirements(ModelCosts(HIDREAM_I1, CUDA), workload), CUDA.speed)


def chosen(word: LayoutWord, num_devices: int, gigabytes: float = 80, *, has_guidance: bool = True) -> str:
    of_model = chooser(has_guidance=has_guidance)
    device = DeviceMemory(int(gigabytes * 1e9), int(gigabytes * 1e9))
    best = of_model.best(of_model.rated(num_devices), word, device, LARGE)
    return "none" if best is None else str(best.layout)


def test_one_guided_image_has_a_half_of_the_guidance_on_each_group() -> None:
    assert chosen(LayoutWord.AUTO, 2) == "cfg=2"
    assert chosen(LayoutWord.AUTO, 4) == "cfg=2,sp=2"
    assert chosen(LayoutWord.AUTO, 8) == "cfg=2,sp=4"


def test_without_guidance_there_are_no_halves_to_divide() -> None:
    for num_devices in (2, 4, 8):
        assert "cfg" not in chosen(LayoutWord.AUTO, num_devices, has_guidance=False)


def test_many_callers_get_whole_models_where_they_fit_and_else_what_sends_least() -> None:
    assert chosen(LayoutWord.THROUGHPUT, 8) == "cfg=2,dp=4"
    # With ep=2,cfg=2,dp=2 the weights would fit, but no full steps.
    assert chosen(LayoutWord.THROUGHPUT, 8, 24) == "ep=2,cfg=2,sp=2"
    assert chosen(LayoutWord.THROUGHPUT, 3, has_guidance=False) == "dp=3"


def test_what_has_no_room_is_not_chosen() -> None:
    assert chosen(LayoutWord.AUTO, 1, 24) == "none"
    assert chosen(LayoutWord.AUTO, 2, 24) == "tp=2"
    assert chosen(LayoutWord.AUTO, 4, 24) == "ep=2,sp=2"


@pytest.mark.parametrize("num_devices", [1, 2, 4, 8])
def test_what_is_chosen_for_one_image_is_never_slower_than_the_table(num_devices: int) -> None:
    of_model = chooser()
    table = of_model.rate(plan_layout(num_devices, of_model.requirements.costs.divisions))
    best = of_model.best(of_model.rated(num_devices), LayoutWord.AUTO, LARGE, LARGE)
    assert best is not None
    assert best.image_seconds <= table.image_seconds


RATED = st.builds(
    RatedLayout,
    layout=st.builds(Layout, tensor_parallel=st.integers(1, 3), data_parallel=st.integers(1, 2)),
    image_seconds=st.integers(1, 3).map(float),
    images_per_second=st.integers(1, 3).map(float),
    needed_bytes=st.integers(1, 3),
)


@given(st.lists(RATED, min_size=1, max_size=12))
def test_for_every_layout_one_is_left_that_is_as_good_in_everything_and_none_twice(
    rated: list[RatedLayout],
) -> None:
    left = list(unbeaten(rated))
    assert len({one.costs for one in left}) == len(left)
    for one in rated:
        assert any(
            all(its <= mine for its, mine in zip(other.costs, one.costs, strict=True)) for other in left
        )
    for one in left:
        assert not any(one.is_beaten_by(other) for other in rated)


@pytest.mark.parametrize("word", [LayoutWord.AUTO, LayoutWord.THROUGHPUT])
@pytest.mark.parametrize("num_devices", [2, 4])
def test_a_start_that_learns_the_memory_late_ends_with_what_is_planned_for_it(
    word: LayoutWord, num_devices: int
) -> None:
    of_model = chooser()
    rated = of_model.rated(num_devices)
    begun = min(rated, key=ORDERS[word]).layout
    for gigabytes in (*range(3, 60, 3), 36.8, 37.0):
        device = DeviceMemory(int(gigabytes * 1e9), int(gigabytes * 1e9))
        layout = of_model.instead_of(rated, word, begun, device, LARGE)
        assert layout == of_model.best_or_leanest(rated, word, device, LARGE).layout
        assert of_model.instead_of(rated, word, layout, device, LARGE) == layout


def test_a_layout_that_gave_way_is_not_taken_again_when_its_devices_turn_out_to_have_more() -> None:
    of_model, word = chooser(), LayoutWord.AUTO
    rated = of_model.rated(2)
    device = DeviceMemory(48 * 10**9, 37 * 10**9)
    begun = min(rated, key=ORDERS[word]).layout
    layout = of_model.instead_of(rated, word, begun, device, LARGE)
    assert (str(begun), str(layout)) == ("cfg=2", "ep=2")
    assert of_model.instead_of(rated, word, layout, LARGE, LARGE) == layout


@pytest.mark.parametrize("num_devices", [1, 3, 7, 8])
def test_whatever_is_lost_some_layout_serves_that_the_model_allows(num_devices: int) -> None:
    of_model = chooser()
    layouts = of_model.after_a_loss(num_devices, LayoutWord.TABLE)
    assert Layout() in layouts
    for layout in layouts:
        check_layout(layout, num_devices, ModelDivisions(20, 4))
    seconds = [of_model.rate(layout).image_seconds for layout in layouts]
    assert seconds == sorted(seconds)


def test_after_a_loss_many_callers_keep_whole_models_and_one_keeps_the_fastest() -> None:
    assert str(chooser().after_a_loss(3, LayoutWord.THROUGHPUT)[0]) == "dp=3"
    assert str(chooser().after_a_loss(7, LayoutWord.AUTO)[0]) == "sp=5"
    assert chooser().after_a_loss(0, LayoutWord.AUTO) == ()
