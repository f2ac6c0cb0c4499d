from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hidream_grpc.model.parallel.groups import ParallelGroups
from hidream_grpc.model.parallel.layout import Layout
from hidream_grpc.model.parallel.rows import divide_rows

layouts = st.builds(
    Layout,
    cfg_parallel=st.integers(1, 2),
    data_parallel=st.integers(1, 3),
    expert_parallel=st.integers(1, 4),
    sequence_parallel=st.integers(1, 2),
    tensor_parallel=st.integers(1, 2),
)


@given(layouts, st.integers(1, 20))
def test_every_row_counts_once_in_the_order_of_the_ranks(layout: Layout, num_rows: int) -> None:
    for first_rank in range(layout.ranks_per_sample_group):
        ranks = range(first_rank, layout.world_size, layout.ranks_per_sample_group)
        divisions = [divide_rows(num_rows, ParallelGroups(layout, rank)) for rank in ranks]
        counted = [row for division in divisions for row in division.own[: division.num_unpadded]]
        assert counted == list(range(num_rows))


@given(layouts, st.integers(1, 20))
def test_ranks_that_share_experts_have_equally_many_rows(layout: Layout, num_rows: int) -> None:
    for rank in range(layout.world_size):
        groups = ParallelGroups(layout, rank)
        division = divide_rows(num_rows, groups)
        others = [divide_rows(num_rows, ParallelGroups(layout, other)) for other in groups.expert.ranks]
        assert division.model == tuple(row for other in others for row in other.own)
        unpadded = (
            range(len(division.model)) if division.unpadded_samples is None else division.unpadded_samples
        )
        assert [division.model[sample] for sample in unpadded] == [
            row for other in others for row in other.own[: other.num_unpadded]
        ]


@given(st.integers(1, 10))
def test_with_two_cfg_groups_each_takes_one_half_of_the_guidance(num_images: int) -> None:
    layout = Layout(cfg_parallel=2)
    unconditional, conditional = (
        divide_rows(2 * num_images, ParallelGroups(layout, rank)).own for rank in range(2)
    )
    assert unconditional == tuple(range(num_images))
    assert conditional == tuple(range(num_images, 2 * num_images))
