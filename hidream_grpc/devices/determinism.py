"""Settings of torch with which the same work on the same device gives the same bits, where torch can."""

from __future__ import annotations

import torch


def use_deterministic_kernels() -> None:
    """Have torch choose kernels that add in a fixed order, in this process, from here on.

    An operation that has no such kernel warns once, in the log of its rank, and runs.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    # It would also fill every new tensor, which finds faults in programs and costs a pass over memory.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
