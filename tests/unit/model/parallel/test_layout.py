from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hidream_grpc.model.parallel.layout import AXIS_KEYS, Layout, Position, share

SIZES = st.integers(min_value=1, max_value=6)
LAYOUTS = st.builds(
    Layout,
    cfg_parallel=st.integers(min_value=1, max_value=2),
    data_parallel=SIZES,
    expert_parallel=SIZES,
    tensor_parallel=SIZES,
)


@given(layout=LAYOUTS)
def test_every_rank_has_a_place_of_its_own_and_every_place_a_rank(layout: Layout) -> None:
    positions = [layout.position(rank) for rank in range(layout.world_size)]
    places = {(position.sample_group, position.tensor_index) for position in positions}
    assert places == {
        (sample_group, tensor_index)
        for sample_group in range(layout.num_sample_groups)
        for tensor_index in range(layout.tensor_parallel)
    }
    assert len(places) == layout.world_size


@given(layout=LAYOUTS)
def test_a_replica_s_ranks_hold_each_share_of_the_model_exactly_once(layout: Layout) -> None:
    ranks_of_one_model = layout.expert_parallel * layout.tensor_parallel
    for first_rank in range(0, layout.world_size, ranks_of_one_model):
        positions = [layout.position(first_rank + offset) for offset in range(ranks_of_one_model)]
        shares = Counter((position.expert_index, position.tensor_index) for position in positions)
        assert set(shares.values()) == {1}
        assert len(shares) == ranks_of_one_model


def test_ranks_that_share_a_layer_are_neighbours() -> None:
    layout = Layout(tensor_parallel=4, expert_parallel=2)
    assert [layout.position(rank) for rank in range(8)] == [
        *(Position(sample_group=0, expert_index=0, tensor_index=index) for index in range(4)),
        *(Position(sample_group=1, expert_index=1, tensor_index=index) for index in range(4)),
    ]


@pytest.mark.parametrize("rank", [-1, 8])
def test_a_rank_that_does_not_exist_has_no_place(rank: int) -> None:
    with pytest.raises(ValueError, match=f"rank {rank} of 8"):
        Layout(tensor_parallel=4, expert_parallel=2).position(rank)


@pytest.mark.parametrize(("axis", "size"), [*((axis, 0) for axis in AXIS_KEYS.values()), ("cfg_parallel", 3)])
def test_a_layout_that_cannot_be_says_which_axis(axis: str, size: int) -> None:
    with pytest.raises(ValueError, match=f"{axis} must be .*, not {size}"):
        Layout(**{axis: size})


@pytest.mark.parametrize(
    ("layout", "text"),
    [
        (Layout(), "tp=1"),
        (Layout(data_parallel=3), "dp=3"),
        (Layout(tensor_parallel=4, expert_parallel=2), "tp=4,ep=2"),
        (
            Layout(tensor_parallel=5, expert_parallel=4, cfg_parallel=2, data_parallel=3),
            "tp=5,ep=4,cfg=2,dp=3",
        ),
    ],
    ids=str,
)
def test_a_layout_reads_as_operators_write_it(layout: Layout, text: str) -> None:
    assert str(layout) == text


@given(
    count=st.integers(min_value=0, max_value=200),
    size=st.integers(min_value=1, max_value=12),
    multiple=st.integers(min_value=1, max_value=16),
)
def test_shares_put_together_are_the_whole_and_differ_by_one_unit_at_most(
    count: int, size: int, multiple: int
) -> None:
    shares = [share(count, index, size, multiple) for index in range(size)]
    assert [thing for one in shares for thing in one] == list(range(count))
    num_units = [-(-len(one) // multiple) for one in shares]
    assert max(num_units) - min(num_units) <= 1
    held = [one for one in shares if one]
    assert all(len(one) % multiple == 0 for one in held[:-1])
