"""Which rank holds which text encoder. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

_Name = TypeVar("_Name", bound=str)


def assign_to_ranks(sizes_bytes: Mapping[_Name, int], world_size: int) -> dict[_Name, int]:
    """Assign components to ranks as evenly as possible: the largest first, each to the emptiest rank.

    Every rank computes the same result from the same sizes.

    Args:
        sizes_bytes: size of each component, by its name.
        world_size: number of ranks.

    Returns:
        The rank of each component, in the order of `sizes_bytes`.
    """
    load_bytes = [0] * world_size
    ranks: dict[_Name, int] = {}
    for name in sorted(sizes_bytes, key=lambda name: (-sizes_bytes[name], name)):
        ranks[name] = min(range(world_size), key=lambda rank: (load_bytes[rank], rank))
        load_bytes[ranks[name]] += sizes_bytes[name]
    return {name: ranks[name] for name in sizes_bytes}
