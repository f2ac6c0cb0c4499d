"""Which part of a checkpoint's tensors a parameter is made of. Knows no model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import nn


@dataclass(frozen=True, slots=True)
class TensorSlice:
    """A part of one tensor of a checkpoint.

    Attributes:
        name: of the tensor.
        rows: of dimension 0; None for all.
        columns: of dimension 1; None for all.
    """

    name: str
    rows: range | None = None
    columns: range | None = None


@runtime_checkable
class Sharded(Protocol):
    """A module that holds parts of a checkpoint's tensors."""

    def slices(self) -> dict[str, tuple[TensorSlice, ...]]:
        """For each of its own parameters the slices that, one under another, make it up."""


def parameter_slices(module: nn.Module) -> dict[str, tuple[TensorSlice, ...]]:
    """For every parameter of a tree of modules the slices it is made of.

    A module that is not `Sharded` has the parameters that the checkpoint calls by the same names.
    """
    return dict(_walk(module))


def _walk(root: nn.Module) -> Iterator[tuple[str, tuple[TensorSlice, ...]]]:
    for path, module in root.named_modules():
        prefix = f"{path}." if path else ""
        if isinstance(module, Sharded):
            for name, slices in module.slices().items():
                yield prefix + name, slices
        else:
            for name, _parameter in module.named_parameters(recurse=False):
                yield prefix + name, (TensorSlice(prefix + name),)
