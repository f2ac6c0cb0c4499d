"""Joins and leaves the torch.distributed group of a generation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import (  # type: ignore[attr-defined]
    PrefixStore,
    TCPStore,
)

from hidream_grpc.devices import torch_private
from hidream_grpc.engine.protocol.messages import JoinGroup
from hidream_grpc.model.parallel.groups import ParallelGroups, collective

STORE_HOST = "127.0.0.1"


def join_group(
    command: JoinGroup, groups: ParallelGroups, rank: int, backend: str, device: torch.device
) -> None:
    """Join the group of a new generation and its axes; block until every rank has joined.

    Call it only after `leave_group`.

    Raises:
        CollectiveError: not every rank joined in time, or one of them died meanwhile.
    """
    with collective("joining"), _waiting(groups):
        init_timeout = timedelta(seconds=command.init_timeout_seconds)
        store = TCPStore(
            STORE_HOST, command.store_port, is_master=False, timeout=init_timeout, wait_for_workers=False
        )
        # Short, since a death during the init makes the others wait several times this timeout.
        dist.init_process_group(
            backend,
            store=PrefixStore(f"g{command.generation}", store),
            rank=rank,
            world_size=command.world_size,
            timeout=init_timeout,
        )
        # Some backends connect only with the first collective.
        dist.all_reduce(torch.ones(1, device=device))
        collective_timeout = timedelta(seconds=command.collective_timeout_seconds)
        torch_private.set_collective_timeout(collective_timeout)
    with _waiting(groups):
        groups.connect(init_timeout, collective_timeout)


@contextmanager
def _waiting(groups: ParallelGroups) -> Iterator[None]:
    """Count the block as one collective, in which the rank waits for others."""
    groups.on_wait(True)
    try:
        yield
    finally:
        groups.on_wait(False)


def leave_group(groups: ParallelGroups) -> None:
    """Leave the group, whole or broken, and its axes; do nothing where there is no group.

    Never call this inside an `except` block, where the frames of the traceback hold references to the group.
    """
    groups.disconnect()
    if dist.is_initialized():
        dist.destroy_process_group()
    # A failed init leaves it raised, and this rank would look for the next group under another name.
    torch_private.reset_group_count()
