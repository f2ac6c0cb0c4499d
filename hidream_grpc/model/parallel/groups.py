"""The axes of a layout as torch.distributed groups, and the collectives that the layers need.

An axis lives as long as its rank; its group lives one generation. Only the axis refers to the group, and
drops it before the group is destroyed. Any other reference, also one in a traceback, would keep the sockets
of the old group open, and ranks that are not neighbours of a dead rank would wait for it for ever (gloo,
torch 2.13).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor

from hidream_grpc.devices import torch_private
from hidream_grpc.model.parallel.layout import Layout, share


class CollectiveError(Exception):
    """A collective failed: another rank died, left, or was too late. The group cannot be used any more."""


@contextmanager
def collective(doing: str) -> Iterator[None]:
    """Turn an error of torch inside the block into a CollectiveError that says what was being done."""
    try:
        yield
    except RuntimeError as error:
        first_sentence = str(error).splitlines()[0].partition(". ")[0]
        raise CollectiveError(f"{doing}: {first_sentence}") from error


class Axis:
    """The ranks that divide something, as one of them sees them.

    Collectives of an axis of size 1 do nothing. All raise CollectiveError when a rank is gone.

    Attributes:
        name: name of the axis in error messages.
        ranks: world ranks of the axis, in the order of their index.
        rank: this rank in the world.
        index: index of this rank on the axis.

    Args:
        on_wait: called with True when a collective is entered, with False when it is left.
    """

    def __init__(
        self,
        name: str,
        ranks: Sequence[int] = (0,),
        rank: int = 0,
        on_wait: Callable[[bool], None] = lambda _is_waiting: None,
    ) -> None:
        self.name = name
        self.ranks = tuple(ranks)
        self.rank = rank
        self.index = self.ranks.index(rank)
        self._on_wait = on_wait
        self._group: dist.ProcessGroup | None = None
        self._skips_collectives = False

    @property
    def size(self) -> int:
        """Number of ranks of the axis."""
        return len(self.ranks)

    def share(self, count: int, multiple: int = 1) -> range:
        """This rank's share of `count` things; see `layout.share`."""
        return share(count, self.index, self.size, multiple)

    def shares(self, count: int) -> list[range]:
        """The shares of all ranks in `count` things, in the order of the axis."""
        return [share(count, index, self.size) for index in range(self.size)]

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum over the axis, in place.

        Returns:
            `tensor`, the same on every rank.
        """
        if self.size > 1:
            self._exchange("summing", dist.all_reduce, tensor)
        return tensor

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Gather one tensor of each rank, all of one shape.

        Returns:
            (size, *tensor.shape), in the order of the axis.
        """
        if self.size == 1:
            return tensor[None]
        gathered = tensor.new_empty((self.size, *tensor.shape))
        self._exchange("gathering", dist.all_gather_single, gathered, tensor)
        return gathered

    def all_gather_shares(self, tensor: Tensor, count: int, dim: int) -> Tensor:
        """Concatenate the ranks' shares of one dimension, which may differ in size.

        Args:
            tensor: this rank's share, of size len(share(count)) in that dimension.
            count: size of all shares together.
            dim: the dimension.

        Returns:
            `tensor`'s shape but for `dim`, which is `count`.
        """
        if self.size == 1:
            return tensor
        lengths = [len(part) for part in self.shares(count)]
        # A collective needs equal sizes; the first share is the largest.
        padded_shape = list(tensor.shape)
        padded_shape[dim] = lengths[0]
        padded = tensor.new_zeros(padded_shape)
        padded.narrow(dim, 0, tensor.shape[dim]).copy_(tensor)
        gathered = self.all_gather(padded)
        return torch.cat(
            [part.narrow(dim, 0, length) for part, length in zip(gathered, lengths, strict=True)], dim=dim
        )

    def reduce_scatter(self, tensor: Tensor) -> Tensor:
        """Sum over the axis; each rank gets its row.

        Args:
            tensor: (size, ...).

        Returns:
            (...), the sum of row `index` of every rank's tensor.
        """
        if self.size == 1:
            return tensor[0]
        scattered = tensor.new_empty(tensor.shape[1:])
        self._exchange("scattering", dist.reduce_scatter_single, scattered, tensor)
        return scattered

    def all_to_all(self, tensor: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """Send consecutive rows of a tensor to each rank, and put those that come one below another.

        Args:
            tensor: (sum of `sent`, ...).
            sent: numbers of rows for the ranks, in the order of the axis.
            received: numbers of rows that the ranks send to this one.

        Returns:
            (sum of `received`, ...), in the order of the axis.
        """
        if self.size == 1:
            return tensor
        exchanged = tensor.new_empty((sum(received), *tensor.shape[1:]))
        row_size = prod(tensor.shape[1:])
        self._exchange(
            "exchanging",
            dist.all_to_all_single,
            exchanged,
            tensor,
            output_split_sizes=[row_size * num_rows for num_rows in received],
            input_split_sizes=[row_size * num_rows for num_rows in sent],
        )
        return exchanged

    def broadcast(self, tensor: Tensor, source: int) -> Tensor:
        """Overwrite `tensor` with that of the rank whose index is `source`; same shape on all ranks.

        Returns:
            `tensor`, the same on every rank.
        """
        if self.size > 1:
            self._exchange("broadcasting", dist.broadcast, tensor, src=self.ranks[source])
        return tensor

    def all_true(self, values: Sequence[bool], device: torch.device) -> list[bool]:
        """Find out for each value whether it is true on all ranks; the result is the same on every rank."""
        if self.size == 1 or not values:
            return list(values)
        flags = torch.tensor(values, dtype=torch.int32, device=device)
        self._exchange("agreeing", dist.all_reduce, flags, op=dist.ReduceOp.MIN)
        return [bool(flag) for flag in flags.tolist()]

    def connect(self, group: dist.ProcessGroup | None) -> None:
        """Use the group of a new generation; None is torch's default group."""
        self._group = group

    def disconnect(self) -> None:
        """Drop the group, which is about to be destroyed."""
        self._group = None

    def skip_collectives(self, skips: bool) -> None:
        """See `ParallelGroups.without_collectives`."""
        self._skips_collectives = skips

    # A compiled graph lives as long as its rank, a group one generation: no graph may hold one.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _exchange(
        self, doing: str, exchange: Callable[..., object], result: Tensor, *inputs: Tensor, **options: object
    ) -> None:
        """Fill `result` by one of torch's collectives."""
        if self._skips_collectives:
            result.zero_()
            return
        flat = [tensor.contiguous().view(-1) for tensor in inputs]
        with collective(f"{doing} over the {self.name} axis"):
            self._on_wait(True)
            try:
                exchange(result.view(-1), *flat, group=self._group, **options)
            finally:
                self._on_wait(False)


class ParallelGroups:
    """The axes of one rank of a layout.

    Attributes:
        layout: the layout of the group.
        tensor: ranks with the same tokens and experts; they divide each layer.
        sequence: ranks with the same samples and the same share of each layer; they divide the tokens.
        expert: ranks with the same share of tokens and layers; they divide the routed experts.
        model: the product of these three: ranks that hold one whole model together.
        samples: ranks with the same share of tokens and layers; they divide the rows of a step.
        world: all ranks.
        on_wait: called around each collective, see `Axis`; also to be called while groups are made.
    """

    def __init__(
        self,
        layout: Layout,
        rank: int = 0,
        on_wait: Callable[[bool], None] = lambda _is_waiting: None,
    ) -> None:
        self.layout = layout
        self.on_wait = on_wait
        self._members = {name: tuple(groups) for name, groups in _axis_ranks(layout).items()}
        self.tensor, self.sequence, self.expert, self.model, self.samples, self.world = (
            Axis(name, next(ranks for ranks in groups if rank in ranks), rank, on_wait)
            for name, groups in self._members.items()
        )

    def connect(self, init_timeout: timedelta, collective_timeout: timedelta) -> None:
        """Make the groups of a generation, inside torch's default group; every rank must call it.

        Args:
            init_timeout: limit for making each group.
            collective_timeout: limit for each collective thereafter.

        Raises:
            CollectiveError: a rank is gone.
        """
        axes = {axis.name: axis for axis in self._axes()}
        made: dict[tuple[int, ...], dist.ProcessGroup | None] = {self.world.ranks: None}
        for name, groups in self._members.items():
            # Every rank makes every group, in the same order, also those that it is no member of.
            for ranks in groups:
                if len(ranks) > 1 and ranks not in made:
                    with collective(f"making the groups of the {name} axis"):
                        made[ranks] = dist.new_group(list(ranks), timeout=init_timeout)
            axis = axes[name]
            axis.connect(made.get(axis.ranks))
        for ranks, group in made.items():
            if group is not None and self.world.rank in ranks:
                torch_private.set_collective_timeout(collective_timeout, group)

    def disconnect(self) -> None:
        """Drop all groups, which are about to be destroyed."""
        for axis in self._axes():
            axis.disconnect()

    @contextmanager
    def without_collectives(self) -> Iterator[None]:
        """Let all collectives inside the block return zeros of the right shape, without any group."""
        for axis in self._axes():
            axis.skip_collectives(True)
        try:
            yield
        finally:
            for axis in self._axes():
                axis.skip_collectives(False)

    def _axes(self) -> tuple[Axis, ...]:
        return self.tensor, self.sequence, self.expert, self.model, self.samples, self.world


def _axis_ranks(layout: Layout) -> dict[str, list[tuple[int, ...]]]:
    """The ranks of every group of every axis."""
    world = tuple(range(layout.world_size))
    tensor_size, group_size = layout.tensor_parallel, layout.ranks_per_sample_group
    sample_groups = _consecutive(world, group_size)
    models = _consecutive(world, layout.expert_parallel * group_size)
    return {
        "tensor": _consecutive(world, tensor_size),
        "sequence": [ranks[index::tensor_size] for ranks in sample_groups for index in range(tensor_size)],
        "expert": [ranks[index::group_size] for ranks in models for index in range(group_size)],
        "model": models,
        "samples": [world[index::group_size] for index in range(group_size)],
        "world": [world],
    }


def _consecutive(ranks: tuple[int, ...], size: int) -> list[tuple[int, ...]]:
    return [ranks[first : first + size] for first in range(0, len(ranks), size)]
