from __future__ import annotations

from collections import Counter
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hidream_grpc.model.parallel.groups import ParallelGroups
from hidream_grpc.model.parallel.layout import Layout

SIZES = st.integers(min_value=1, max_value=4)
LAYOUTS = st.builds(
    Layout,
    cfg_parallel=st.integers(min_value=1, max_value=2),
    data_parallel=SIZES,
    expert_parallel=SIZES,
    sequence_parallel=SIZES,
    tensor_parallel=SIZES,
)


@given(layout=LAYOUTS)
def test_every_rank_has_a_place_of_its_own_and_every_place_a_rank(layout: Layout) -> None:
    ranks = [ParallelGroups(layout, rank) for rank in range(layout.world_size)]
    places = {(groups.samples.index, groups.sequence.index, groups.tensor.index) for groups in ranks}
    assert places == set(
        product(
            range(layout.num_sample_groups), range(layout.sequence_parallel), range(layout.tensor_parallel)
        )
    )
    assert len(places) == layout.world_size


@given(layout=LAYOUTS)
def test_a_replica_s_ranks_hold_each_share_of_the_model_exactly_once(layout: Layout) -> None:
    ranks_of_one_model = layout.expert_parallel * layout.ranks_per_sample_group
    for first_rank in range(0, layout.world_size, ranks_of_one_model):
        ranks = [ParallelGroups(layout, first_rank + offset) for offset in range(ranks_of_one_model)]
        shares = Counter(
            (groups.expert.index, groups.sequence.index, groups.tensor.index) for groups in ranks
        )
        assert set(shares.values()) == {1}
        assert len(shares) == ranks_of_one_model


def test_ranks_that_share_a_layer_are_neighbours() -> None:
    ranks = [ParallelGroups(Layout(tensor_parallel=4, expert_parallel=2), rank) for rank in range(8)]
    assert [(groups.samples.index, groups.expert.index, groups.tensor.index) for groups in ranks] == [
        *((0, 0, index) for index in range(4)),
        *((1, 1, index) for index in range(4)),
    ]


@pytest.fixture
def groups() -> ParallelGroups:
    """The axes of one rank of four, without a group."""
    return ParallelGroups(Layout(tensor_parallel=2, expert_parallel=2), rank=3)


def test_without_collectives_results_have_the_right_shape(groups: ParallelGroups) -> None:
    with groups.without_collectives():
        assert groups.tensor.all_reduce(torch.ones(3, 5)).shape == (3, 5)
        assert groups.expert.all_gather(torch.ones(3, 5)).shape == (2, 3, 5)
        assert groups.samples.all_gather_shares(torch.ones(2, 5), 5, dim=0).shape == (5, 5)
        assert groups.expert.reduce_scatter(torch.ones(2, 3, 5)).shape == (3, 5)
        assert groups.expert.all_to_all(torch.ones(5, 7), [2, 3], [4, 4]).shape == (8, 7)
        assert groups.world.broadcast(torch.ones(3, 5), source=0).shape == (3, 5)


def test_without_collectives_results_are_the_same_every_time(groups: ParallelGroups) -> None:
    with groups.without_collectives():
        gathered = groups.expert.all_gather(torch.full((1000,), torch.nan))
    assert torch.equal(gathered, torch.zeros(2, 1000))


def test_afterwards_collectives_need_a_group_again(groups: ParallelGroups) -> None:
    with pytest.raises(RuntimeError, match="in the block"), groups.without_collectives():
        raise RuntimeError("in the block")
    with pytest.raises(ValueError, match="process group"):
        groups.tensor.all_reduce(torch.ones(3))
