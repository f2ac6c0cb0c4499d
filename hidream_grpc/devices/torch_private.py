"""The private names of torch that a rank depends on; any version of torch may change them.

Source: torch 2.13.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch._dynamo
import torch._inductor.config
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d


def set_collective_timeout(timeout: timedelta, group: dist.ProcessGroup | None = None) -> None:
    """Change the timeout of a group's collectives after its init; None is the default group."""
    distributed_c10d._set_pg_timeout(timeout, group)


def reset_group_count() -> None:
    """Number the next process group as the first one: an init that failed leaves the number raised."""
    distributed_c10d._world.group_count = 0


def flash_attention(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """The flash kernel of a GPU, with the logarithms of its sums.

    Args:
        query, key, value: (B, heads, tokens, channels).

    Returns:
        The attended values, as `query`, and the log-sum-exp of each query's logits, (B, heads, tokens).
    """
    attended, logsumexp, *_ = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)
    return attended, logsumexp


@contextmanager
def strict_compilation(max_graphs: int) -> Iterator[None]:
    """Compile inside the block in this process alone, without warnings, and fail beyond `max_graphs`.

    Args:
        max_graphs: how many graphs a function may be compiled to.
    """
    torch._logging.set_logs(all=logging.ERROR)  # type: ignore[attr-defined]
    with (
        warnings.catch_warnings(action="ignore"),
        # Reaching the limit would leave a shape without its graphs and say so nowhere.
        torch._dynamo.config.patch(recompile_limit=max_graphs, fail_on_recompile_limit_hit=True),
        # The compiler's pool of processes would outlive a rank that is killed.
        torch._inductor.config.patch(compile_threads=1),
    ):
        yield
