"""Which part of a checkpoint's tensors a parameter is made of. Independent of any model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import nn


@dataclass(frozen=True, slots=True)
class TensorSlice:
    """A part of one tensor of a checkpoint.

    Attributes:
        name: name of the tensor.
        rows: range of dimension 0; None for all.
        columns: range of dimension 1; None for all.
    """

    name: str
    rows: range | None = None
    columns: range | None = None


@runtime_checkable
class Sharded(Protocol):
    """A module that holds parts of a checkpoint's tensors."""

    def slices(self) -> dict[str, tuple[TensorSlice, ...]]:
        """For each parameter of the module itself, the slices that form it, one below another."""


def parameter_slices(module: nn.Module) -> dict[str, tuple[TensorSlice, ...]]:
    """For every parameter of a tree of modules, the slices that form it.

    The parameters of a module that is not `Sharded` have the same names in the checkpoint.
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
