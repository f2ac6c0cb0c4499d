"""Which rows of a step each rank computes, and how all ranks get all of them. Knows no model."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hidream_grpc.model.parallel.groups import ParallelGroups
from hidream_grpc.model.parallel.layout import share


@dataclass(frozen=True, slots=True)
class RowDivision:
    """The rows of one step as one rank sees them.

    Attributes:
        own: rows that this rank computes; as many as any rank of its expert axis has, so that some may
            be there only to fill up.
        num_real: how many of them count; they come first.
        model: `own` of all ranks of the expert axis, in its order.
        real_samples: which entries of `model` count; None for all.
    """

    own: tuple[int, ...]
    num_real: int
    model: tuple[int, ...]
    real_samples: tuple[int, ...] | None


def divide_rows(num_rows: int, groups: ParallelGroups) -> RowDivision:
    """Divide the rows of a step among the sample groups, contiguous and as even as possible.

    Args:
        num_rows: of the step.
        groups: of this rank.
    """
    samples, num_expert_ranks = groups.samples, groups.expert.size
    first_group = samples.index - groups.expert.index
    shares = [share(num_rows, first_group + index, samples.size) for index in range(num_expert_ranks)]
    longest = max(shares, key=len)
    # A rank without enough rows computes one twice: it would wait for the others anyway.
    filled = [(*rows, *longest[len(rows) :]) for rows in shares]
    real = [
        position * len(longest) + index for position, rows in enumerate(shares) for index in range(len(rows))
    ]
    return RowDivision(
        own=filled[groups.expert.index],
        num_real=len(shares[groups.expert.index]),
        model=tuple(row for rows in filled for row in rows),
        real_samples=None if len(real) == num_expert_ranks * len(longest) else tuple(real),
    )


def gather_rows(own: Tensor, num_rows: int, groups: ParallelGroups) -> Tensor:
    """Put together the rows that `divide_rows` divided.

    Args:
        own: (`num_real`, ...), this rank's.
        num_rows: of the step.
        groups: of this rank.

    Returns:
        (num_rows, ...), the same on every rank.

    Raises:
        CollectiveError: a rank is gone.
    """
    return groups.samples.all_gather_shares(own, num_rows, dim=0)
