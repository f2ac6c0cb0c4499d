"""The torch.distributed group of one generation, and the collectives that a plan needs.

Everything goes through torch's default group, looked up anew each time: a reference that is kept
anywhere, in a traceback too, keeps the old group's sockets open, and ranks that are not neighbours
of the dead one then wait for it for ever (gloo, torch 2.13).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import (  # type: ignore[attr-defined]
    PrefixStore,
    TCPStore,
    distributed_c10d,
)

from hidream_grpc.engine.messages import JoinGroup
from hidream_grpc.model.parallel.layout import sample_share

STORE_HOST = "127.0.0.1"


class CollectiveError(Exception):
    """A collective failed: another rank died, left, or was too late. The group is of no more use."""


def join_group(command: JoinGroup, rank: int, backend: str, device: torch.device) -> None:
    """Become a member of a new generation's group; blocks until every rank is.

    Call only after `leave_group`.

    Raises:
        CollectiveError: not every rank came in time, or one of them died meanwhile.
    """
    with _collective("joining"):
        init_timeout = timedelta(seconds=command.init_timeout_seconds)
        store = TCPStore(
            STORE_HOST, command.store_port, is_master=False, timeout=init_timeout, wait_for_workers=False
        )
        # A death during the init makes the others wait several times this timeout: it is short here.
        dist.init_process_group(
            backend,
            store=PrefixStore(f"g{command.generation}", store),
            rank=rank,
            world_size=command.world_size,
            timeout=init_timeout,
        )
        # Some backends connect with the first collective only.
        dist.all_reduce(torch.ones(1, device=device))
        distributed_c10d._set_pg_timeout(timedelta(seconds=command.collective_timeout_seconds))


def leave_group() -> None:
    """Leave the group, whole or broken; nothing happens where there is none.

    Never call this inside an `except` block: the traceback's frames hold references.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
    # An init that failed leaves it raised, and this rank would look for the next group by another name.
    distributed_c10d._world.group_count = 0


def all_gather_shares(share: Tensor, num_rows: int) -> Tensor:
    """Put together what each rank computed of the rows that `sample_share` divides.

    Args:
        share: (len(sample_share(num_rows, this rank, world size)), ...), this rank's rows.
        num_rows: of all ranks together.

    Returns:
        (num_rows, ...), the same on every rank.

    Raises:
        CollectiveError: a rank is gone.
    """
    world_size = dist.get_world_size()
    # A collective wants equal sizes; rank 0 has the largest share.
    max_rows = len(sample_share(num_rows, 0, world_size))
    padded = share.new_zeros((max_rows, *share.shape[1:]))
    padded[: share.shape[0]] = share
    gathered = share.new_empty((world_size * max_rows, *share.shape[1:]))
    with _collective("gathering the noise predictions"):
        dist.all_gather_single(gathered, padded)
    shares = gathered.view(world_size, *padded.shape)
    return torch.cat(
        [shares[rank, : len(sample_share(num_rows, rank, world_size))] for rank in range(world_size)]
    )


def true_on_every_rank(values: Sequence[bool], device: torch.device) -> list[bool]:
    """For each value, whether it is true on all ranks; the answer is the same on every rank.

    Raises:
        CollectiveError: a rank is gone.
    """
    flags = torch.tensor(values, dtype=torch.int32, device=device)
    with _collective("agreeing on admissions"):
        dist.all_reduce(flags, op=dist.ReduceOp.MIN)
    return [bool(flag) for flag in flags.tolist()]


@contextmanager
def _collective(doing: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        first_sentence = str(error).splitlines()[0].partition(". ")[0]
        raise CollectiveError(f"{doing}: {first_sentence}") from error
