"""Which share of a model and of a step's rows a rank of a layout has, without making its groups."""

from __future__ import annotations

from dataclasses import dataclass

from hidream_grpc.model.parallel.layout import Layout, share


@dataclass(frozen=True, slots=True)
class RankPlace:
    """The place of one rank on the axes of its layout.

    Attributes:
        layout: the layout of all ranks.
        tensor_index: index on the axis that divides each layer.
        sequence_index: index on the axis that divides the tokens of a sample.
        expert_index: index on the axis that divides the routed experts.
        sample_index: index of its sample group among all of them.
    """

    layout: Layout
    tensor_index: int
    sequence_index: int
    expert_index: int
    sample_index: int

    @classmethod
    def of(cls, layout: Layout, rank: int) -> RankPlace:
        """The place of a rank of the world; see `layout` for the order of the axes."""
        token_group, tensor_index = divmod(rank, layout.tensor_parallel)
        sample_index, sequence_index = divmod(token_group, layout.sequence_parallel)
        return cls(layout, tensor_index, sequence_index, sample_index % layout.expert_parallel, sample_index)

    @property
    def model_size(self) -> int:
        """Number of ranks that hold one whole model together."""
        return self.layout.expert_parallel * self.layout.ranks_per_sample_group

    def tensor_share(self, count: int, multiple: int = 1) -> range:
        """Which of `count` things this rank has of those that tensor parallel divides."""
        return share(count, self.tensor_index, self.layout.tensor_parallel, multiple)

    def token_share(self, count: int) -> int:
        """How many of `count` tokens of one stream this rank has."""
        return len(share(count, self.sequence_index, self.layout.sequence_parallel))

    def expert_share(self, count: int) -> range:
        """Which of `count` routed experts this rank has."""
        return share(count, self.expert_index, self.layout.expert_parallel)

    def model_share(self, count: int) -> range:
        """Which of `count` things this rank has of those that all ranks of a model divide."""
        sample_group = self.expert_index * self.layout.sequence_parallel + self.sequence_index
        index = sample_group * self.layout.tensor_parallel + self.tensor_index
        return share(count, index, self.model_size)

    def rows(self, num_rows: int) -> tuple[int, int]:
        """How many rows of a step this rank computes, as `divide_rows` divides them.

        Args:
            num_rows: rows of the step on all ranks together.

        Returns:
            Rows of this rank, padding included, and those of its whole expert axis that are not padding.
        """
        first_group = self.sample_index - self.expert_index
        shares = [
            len(share(num_rows, first_group + index, self.layout.num_sample_groups))
            for index in range(self.layout.expert_parallel)
        ]
        return max(shares), sum(shares)
