"""How the ranks of a group share the work. Torch-free; validates itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Layout:
    """Sizes of the parallel axes; their product is the world size.

    Attributes:
        data_parallel: ranks that hold the whole model and divide the samples of a step.
        tensor_parallel: ranks that share each matrix.
        expert_parallel: ranks that share the routed experts.
    """

    data_parallel: int = 1
    tensor_parallel: int = 1
    expert_parallel: int = 1

    def __post_init__(self) -> None:
        for axis in ("data_parallel", "tensor_parallel", "expert_parallel"):
            if getattr(self, axis) < 1:
                raise ValueError(f"{axis} must be at least 1, not {getattr(self, axis)}")

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.data_parallel * self.tensor_parallel * self.expert_parallel

    def __str__(self) -> str:
        return f"dp={self.data_parallel},tp={self.tensor_parallel},ep={self.expert_parallel}"


def sample_share(num_samples: int, rank: int, world_size: int) -> range:
    """The samples of a step that one rank computes: contiguous, sizes differ by at most one.

    Args:
        num_samples: rows of the whole forward.
        rank: 0 to world_size - 1.
        world_size: ranks that divide the samples.
    """
    quotient, remainder = divmod(num_samples, world_size)
    start = rank * quotient + min(rank, remainder)
    return range(start, start + quotient + (1 if rank < remainder else 0))
