from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hidream_grpc.devices.device_types import DEVICE_TYPES, DeviceType
from hidream_grpc.errors import ConfigurationError
from hidream_grpc.model.parallel.layout import Layout
from hidream_grpc.model.parallel.planner import (
    ModelDivisions,
    check_layout,
    choose_layout,
    parse_layout,
    plan_layout,
)

REAL_MODEL = ModelDivisions(num_attention_heads=20, num_routed_experts=4)
DEMO_MODEL = ModelDivisions(num_attention_heads=4, num_routed_experts=4)
INDIVISIBLE_MODEL = ModelDivisions(num_attention_heads=1, num_routed_experts=1)

NUM_DEVICES = st.integers(min_value=1, max_value=64)
DIVISIONS = st.builds(ModelDivisions, st.integers(1, 24), st.integers(1, 12))
SIZES = st.integers(min_value=1, max_value=5)
LAYOUTS = st.builds(
    Layout,
    cfg_parallel=st.integers(min_value=1, max_value=2),
    data_parallel=SIZES,
    expert_parallel=SIZES,
    sequence_parallel=SIZES,
    tensor_parallel=SIZES,
)


def is_allowed(layout: Layout, num_devices: int, divisions: ModelDivisions) -> bool:
    return (
        divisions.num_attention_heads % (layout.tensor_parallel * layout.sequence_parallel) == 0
        and divisions.num_routed_experts % layout.expert_parallel == 0
        and layout.world_size <= num_devices
    )


@pytest.mark.parametrize("divisions", [REAL_MODEL, DEMO_MODEL], ids=["20 heads", "4 heads"])
@pytest.mark.parametrize(("num_devices", "text"), [(1, "tp=1"), (2, "tp=2"), (4, "tp=4"), (8, "tp=4,ep=2")])
def test_the_reference_table_holds(num_devices: int, text: str, divisions: ModelDivisions) -> None:
    assert str(plan_layout(num_devices, divisions)) == text


@pytest.mark.parametrize(
    ("num_devices", "num_heads", "num_experts", "text"),
    [
        (3, 20, 4, "tp=2"),
        (5, 20, 4, "tp=5"),
        (6, 20, 4, "tp=5"),
        (7, 20, 4, "tp=5"),
        (3, 4, 4, "tp=2"),
        (5, 4, 4, "tp=4"),
        (6, 4, 4, "tp=4"),
        (7, 4, 4, "tp=4"),
        (2, 6, 6, "tp=2"),
        (3, 6, 6, "tp=3"),
        (4, 6, 8, "tp=2,ep=2"),
        (6, 6, 6, "tp=3,ep=2"),
        (3, 4, 6, "ep=3"),
        (2, 5, 3, "tp=1"),
        (10, 20, 4, "tp=5,ep=2"),
        (16, 20, 4, "tp=4,ep=4"),
        (24, 20, 4, "tp=4,ep=2,dp=3"),
        (32, 20, 4, "tp=4,ep=4,dp=2"),
    ],
)
def test_other_counts_and_models_get_the_layout_that_uses_most_devices(
    num_devices: int, num_heads: int, num_experts: int, text: str
) -> None:
    assert str(plan_layout(num_devices, ModelDivisions(num_heads, num_experts))) == text


@given(num_devices=NUM_DEVICES, divisions=DIVISIONS)
def test_whatever_is_planned_fits_and_may_be_asked_for(num_devices: int, divisions: ModelDivisions) -> None:
    layout = plan_layout(num_devices, divisions)
    assert is_allowed(layout, num_devices, divisions)
    assert choose_layout(str(layout), num_devices, "tp=1", divisions) == layout
    # A replica needs the memory of a whole model.
    assert layout.data_parallel == 1 or layout.world_size >= 8 * layout.data_parallel


@given(num_devices=NUM_DEVICES, divisions=DIVISIONS)
def test_no_other_division_of_one_model_uses_more_devices(
    num_devices: int, divisions: ModelDivisions
) -> None:
    others = [
        Layout(tensor_parallel=tensor_parallel, expert_parallel=expert_parallel)
        for tensor_parallel in range(1, 25)
        for expert_parallel in range(1, 13)
    ]
    allowed = [layout.world_size for layout in others if is_allowed(layout, num_devices, divisions)]
    assert plan_layout(num_devices, divisions).world_size >= max(allowed)


@given(layout=LAYOUTS)
def test_a_layout_can_be_asked_for_as_it_is_shown(layout: Layout) -> None:
    assert parse_layout(str(layout)) == layout


@pytest.mark.parametrize(
    ("text", "layout"),
    [
        ("tp=1", Layout()),
        (
            "tp=2,ep=2,cfg=2,dp=1",
            Layout(tensor_parallel=2, expert_parallel=2, cfg_parallel=2),
        ),
        ("dp=3, cfg=2 ", Layout(data_parallel=3, cfg_parallel=2)),
    ],
)
def test_axes_stand_in_any_order_and_are_1_where_not_named(text: str, layout: Layout) -> None:
    assert parse_layout(text) == layout


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "'' in '' is no axis"),
        ("tp", "'tp' in 'tp' is no axis"),
        ("tp=0", "'tp=0' in 'tp=0' is no axis"),
        ("tp=2,", "'' in 'tp=2,' is no axis"),
        ("pp=2", "'pp=2' in 'pp=2' is no axis: give tp, ep, cfg, sp, dp a size from 1"),
        ("tp=2 ep=2", "'tp=2 ep=2' in 'tp=2 ep=2' is no axis"),
        ("tp=2\nep=2", r"'tp=2\nep=2' in 'tp=2\nep=2' is no axis"),
        ("tp=2,ep=2,tp=4", "tp is named twice in 'tp=2,ep=2,tp=4'"),
        ("cfg=3", "cfg=3 in 'cfg=3': guidance has two halves, so cfg is 1 or 2"),
        ("tp=2,dp=1000", "'tp=2,dp=1000' needs 2000 devices, more than 1024"),
    ],
)
def test_a_text_that_is_no_layout_is_one_line_that_names_the_flag(text: str, words: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        parse_layout(text)
    assert str(refused.value).startswith(f"--layout: {words}")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "num_devices", "reason"),
    [
        (
            "tp=8",
            8,
            "tp=8 does not divide 20 attention heads; tp=4,ep=2 or tp=5 would work on 8 devices",
        ),
        ("ep=3", 4, "ep=3 does not divide 4 routed experts; tp=4 or ep=4 would work on 4 devices"),
        ("tp=4,ep=4", 8, "tp=4,ep=4 needs 16 devices, there are 8; tp=4,ep=2 would work on 8 devices"),
        ("tp=2", 1, "tp=2 needs 2 devices, there is 1; tp=1 would work on 1 device"),
        (
            "tp=8,cfg=2",
            16,
            "tp=8 does not divide 20 attention heads; tp=4,ep=2,cfg=2 or tp=5,cfg=2 would work on 16 devices",
        ),
        (
            "cfg=2,dp=3",
            4,
            "cfg=2,dp=3 needs 6 devices, there are 4; cfg=2,dp=2 would work on 4 devices",
        ),
        (
            "cfg=2,sp=3",
            6,
            "sp=3 does not divide the 20 attention heads of a rank; "
            "tp=5 or cfg=2,sp=2 would work on 6 devices",
        ),
        (
            "tp=4,sp=2",
            8,
            "sp=2 does not divide the 5 attention heads of a rank; "
            "tp=2,ep=2,sp=2 or tp=4 would work on 8 devices",
        ),
        ("tp=3", None, "tp=3 does not divide 20 attention heads; tp=2 would work on 3 devices"),
    ],
)
def test_a_layout_that_cannot_be_is_one_line_with_the_reason_and_what_would_work(
    text: str, num_devices: int | None, reason: str
) -> None:
    with pytest.raises(ConfigurationError) as refused:
        choose_layout(text, num_devices, "tp=1", REAL_MODEL)
    assert str(refused.value) == f"--layout: {reason}"


@given(layout=LAYOUTS, num_devices=st.integers(min_value=1, max_value=16), divisions=DIVISIONS)
def test_a_layout_is_refused_exactly_if_it_cannot_be_and_all_that_are_named_instead_can(
    layout: Layout, num_devices: int, divisions: ModelDivisions
) -> None:
    if is_allowed(layout, num_devices, divisions):
        check_layout(layout, num_devices, divisions)
        return
    with pytest.raises(ConfigurationError) as refused:
        check_layout(layout, num_devices, divisions)
    _, _, would_work = refused.value.reason.rpartition("; ")
    instead, _, _ = would_work.partition(" would work on ")
    for text in instead.split(" or "):
        check_layout(parse_layout(text), num_devices, divisions)


def test_a_layout_may_leave_devices_idle() -> None:
    assert choose_layout("tp=2", 8, "tp=1", REAL_MODEL) == Layout(tensor_parallel=2)


def test_a_layout_without_devices_gets_as_many_as_it_needs() -> None:
    assert choose_layout("tp=5,dp=2", None, "tp=1", REAL_MODEL).world_size == 10


@pytest.mark.parametrize("device_type", DEVICE_TYPES.values(), ids=list(DEVICE_TYPES))
def test_without_devices_and_layout_every_model_runs_as_the_device_type_says(
    device_type: DeviceType,
) -> None:
    layout = choose_layout(None, None, device_type.default_layout, INDIVISIBLE_MODEL)
    check_layout(layout, layout.world_size, INDIVISIBLE_MODEL)
    assert str(layout) == device_type.default_layout


def test_two_ranks_on_a_cpu_divide_the_guidance_unless_devices_are_named() -> None:
    cpu = DEVICE_TYPES["cpu"]
    assert str(choose_layout(None, None, cpu.default_layout, DEMO_MODEL)) == "cfg=2"
    assert str(choose_layout(None, 2, cpu.default_layout, DEMO_MODEL)) == "tp=2"
