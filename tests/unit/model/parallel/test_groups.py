from __future__ import annotations

import pytest
import torch

from hidream_grpc.model.parallel.groups import ParallelGroups
from hidream_grpc.model.parallel.layout import Layout


@pytest.fixture
def groups() -> ParallelGroups:
    """One rank of four, which is alone: there is no group."""
    return ParallelGroups(Layout(tensor_parallel=2, expert_parallel=2), rank=3)


def test_a_rehearsal_gives_results_of_the_right_shape_without_a_group(groups: ParallelGroups) -> None:
    with groups.without_collectives():
        assert groups.tensor.all_reduce(torch.ones(3, 5)).shape == (3, 5)
        assert groups.expert.all_gather(torch.ones(3, 5)).shape == (2, 3, 5)
        assert groups.samples.all_gather_shares(torch.ones(2, 5), 5, dim=0).shape == (5, 5)
        assert groups.expert.reduce_scatter(torch.ones(2, 3, 5)).shape == (3, 5)
        assert groups.world.broadcast(torch.ones(3, 5), source=0).shape == (3, 5)


def test_what_a_rehearsal_gives_is_the_same_every_time(groups: ParallelGroups) -> None:
    with groups.without_collectives():
        gathered = groups.expert.all_gather(torch.full((1000,), torch.nan))
    assert torch.equal(gathered, torch.zeros(2, 1000))


def test_after_a_rehearsal_collectives_need_a_group_again(groups: ParallelGroups) -> None:
    with pytest.raises(RuntimeError, match="in the block"), groups.without_collectives():
        raise RuntimeError("in the block")
    with pytest.raises(ValueError, match="process group"):
        groups.tensor.all_reduce(torch.ones(3))
