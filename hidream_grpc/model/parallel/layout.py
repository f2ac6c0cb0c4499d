"""How the ranks of a group share the work. A layout validates itself.

    sample group = (cfg × data parallel + data) × expert parallel + expert
    world rank = (sample group × sequence parallel + sequence) × tensor parallel + tensor

The rows of a step are divided among the sample groups, unconditional rows first, so that two cfg groups get
one half of the guidance each. The ranks of a sample group compute the same rows: each sequence index has
a part of their tokens, each tensor index its share of every layer. The sample groups with one cfg and data
index share the routed experts.
"""

from __future__ import annotations

from dataclasses import dataclass

AXIS_KEYS = {
    "tp": "tensor_parallel",
    "ep": "expert_parallel",
    "cfg": "cfg_parallel",
    "sp": "sequence_parallel",
    "dp": "data_parallel",
}
"""The axes as operators write them, such as `tp=4,ep=2`."""

HIDDEN_UNITS_MULTIPLE = 16
"""Shares of hidden units are multiples of it: kernels of accelerators need rows of a multiple of 16 bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Sizes of the parallel axes; their product is the world size.

    Attributes:
        cfg_parallel: number of groups that take the halves of the guidance, 1 or 2.
        data_parallel: number of groups that take different images.
        expert_parallel: number of groups that take different samples and divide the routed experts.
        sequence_parallel: number of groups that take different tokens of the same samples, and in attention
            different heads.
        tensor_parallel: number of ranks that divide each layer of the same samples.
    """

    cfg_parallel: int = 1
    data_parallel: int = 1
    expert_parallel: int = 1
    sequence_parallel: int = 1
    tensor_parallel: int = 1

    def __post_init__(self) -> None:
        for axis in AXIS_KEYS.values():
            if getattr(self, axis) < 1:
                raise ValueError(f"{axis} must be at least 1, not {getattr(self, axis)}")
        if self.cfg_parallel > 2:
            raise ValueError(f"cfg_parallel must be 1 or 2, not {self.cfg_parallel}")

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.num_sample_groups * self.ranks_per_sample_group

    @property
    def ranks_per_sample_group(self) -> int:
        """Number of ranks that compute the same rows of a step."""
        return self.sequence_parallel * self.tensor_parallel

    @property
    def num_sample_groups(self) -> int:
        """Number of groups of ranks among which the rows of a step are divided."""
        return self.cfg_parallel * self.data_parallel * self.expert_parallel

    def __str__(self) -> str:
        sizes = {key: getattr(self, axis) for key, axis in AXIS_KEYS.items()}
        return ",".join(f"{key}={size}" for key, size in sizes.items() if size > 1) or "tp=1"


def share(count: int, index: int, size: int, multiple: int = 1) -> range:
    """The share of one of `size` ranks in `count` things: contiguous, and as even as possible.

    Args:
        count: number of things.
        index: index of the rank, 0 to size - 1.
        size: number of ranks that divide the things.
        multiple: shares are multiples of it, except for the last one that is not empty.
    """
    num_units = -(-count // multiple)
    quotient, remainder = divmod(num_units, size)
    start = index * quotient + min(index, remainder)
    stop = start + quotient + (1 if index < remainder else 0)
    return range(min(start * multiple, count), min(stop * multiple, count))
