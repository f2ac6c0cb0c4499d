"""Which rows of a step each rank computes, and how all ranks get all of them. Independent of any model."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hidream_grpc.model.parallel.groups import ParallelGroups
from hidream_grpc.model.parallel.layout import share


@dataclass(frozen=True, slots=True)
class RowDivision:
    """The rows of one step as one rank sees them.

    Attributes:
        own: rows that this rank computes, padded with repeated ones to as many as any rank of its expert
            axis has.
        num_unpadded: rows of `own` that are not padding; they come first.
        model: `own` of all ranks of the expert axis, in its order.
        unpadded_samples: indices of the entries of `model` that are not padding; None for all.
    """

    own: tuple[int, ...]
    num_unpadded: int
    model: tuple[int, ...]
    unpadded_samples: tuple[int, ...] | None


def divide_rows(num_rows: int, groups: ParallelGroups) -> RowDivision:
    """Divide the rows of a step among the sample groups, contiguous and as even as possible.

    Args:
        num_rows: rows of the step.
        groups: the axes of this rank.
    """
    samples, num_expert_ranks = groups.samples, groups.expert.size
    first_group = samples.index - groups.expert.index
    shares = [share(num_rows, first_group + index, samples.size) for index in range(num_expert_ranks)]
    longest = max(shares, key=len)
    # A rank with fewer rows repeats some, since it would wait for the others anyway.
    padded = [(*rows, *longest[len(rows) :]) for rows in shares]
    unpadded = [
        position * len(longest) + index for position, rows in enumerate(shares) for index in range(len(rows))
    ]
    return RowDivision(
        own=padded[groups.expert.index],
        num_unpadded=len(shares[groups.expert.index]),
        model=tuple(row for rows in padded for row in rows),
        unpadded_samples=None if len(unpadded) == num_expert_ranks * len(longest) else tuple(unpadded),
    )


def gather_rows(own: Tensor, num_rows: int, groups: ParallelGroups) -> Tensor:
    """Gather the rows that `divide_rows` divided.

    Args:
        own: (`num_unpadded`, ...), the rows of this rank.
        num_rows: rows of the step.
        groups: the axes of this rank.

    Returns:
        (num_rows, ...), the same on every rank.

    Raises:
        CollectiveError: a rank is gone.
    """
    return groups.samples.all_gather_shares(own, num_rows, dim=0)
