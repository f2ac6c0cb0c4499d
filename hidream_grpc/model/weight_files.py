"""The one reader of what holds a component's weights: which files, and the tensors in them. Torch-free."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import msgspec
from safetensors import SafetensorError, safe_open

from hidream_grpc.errors import ModelNotFoundError
from hidream_grpc.model.checkpoint_files import MODEL_PATH_FLAG, UNFINISHED_DOWNLOAD, check_file, read_json
from hidream_grpc.model.hub import has_unfinished_download


class Library(StrEnum):
    """The library that a component is of; the value is what it calls the component's weights."""

    DIFFUSERS = "diffusion_pytorch_model"
    TRANSFORMERS = "model"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a component, as the header of its file says.

    Attributes:
        file: that holds it.
        dtype: as safetensors writes it: F32, BF16, F8_E4M3, I64.
        shape: of the tensor.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def is_weight(self) -> bool:
        """Whether it is learnt: integers are constants, such as the position ids of older CLIPs."""
        return "F" in self.dtype

    @property
    def num_elements(self) -> int:
        """How many numbers it is made of."""
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        """Its size in the file."""
        bits = re.search(r"\d+", self.dtype)
        return self.num_elements * (8 if bits is None else int(bits[0])) // 8


class _WeightIndex(msgspec.Struct, frozen=True):
    weight_map: dict[str, str]


def weight_files(folder: Path, library: Library, flag: str = MODEL_PATH_FLAG) -> tuple[Path, ...]:
    """Files that a component is loaded from: its index, where there is one, and those with its tensors.

    What else lies in the folder counts for nothing: weights in another precision, such as
    `model.fp16.safetensors`, their index, and an index whose files are gone beside one whole file.

    Raises:
        ModelNotFoundError: there are none, or one that the index names is missing.
    """
    single = folder / f"{library}.safetensors"
    index = folder / f"{library}.safetensors.index.json"
    if single.is_file() and (library is Library.TRANSFORMERS or not index.is_file()):
        return (single,)
    if index.is_file():
        names = sorted(set(read_json(index, _WeightIndex, flag).weight_map.values()))
        missing = [folder / name for name in names if not (folder / name).is_file()]
        if missing and single.is_file():
            return (single,)
        for path in missing:
            check_file(path, flag)
        return (index, *(folder / name for name in names))
    if single.is_symlink() or index.is_symlink():
        check_file(single if single.is_symlink() else index, flag)
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    but = f", but {others[0]}, which is not loaded" if others else ""
    unfinished = UNFINISHED_DOWNLOAD if has_unfinished_download(folder) else ""
    raise ModelNotFoundError(flag, folder, f"no weights: no {single.name}{but}{unfinished}")


def read_tensors(folder: Path, library: Library, flag: str = MODEL_PATH_FLAG) -> dict[str, StoredTensor]:
    """Read the headers of a component's weight files.

    Returns:
        All tensors of the component by name.

    Raises:
        ModelNotFoundError: a file is missing, or is not a whole safetensors file.
    """
    tensors: dict[str, StoredTensor] = {}
    for path in weight_files(folder, library, flag):
        if path.suffix == ".safetensors":
            tensors |= _read_header(path, flag)
    return tensors


def num_weights(tensors: Mapping[str, StoredTensor], left_out: str | None = None) -> int:
    """How many numbers the weights of a component are.

    Args:
        tensors: of the component.
        left_out: beginning of the names of tensors that are not counted.
    """
    return sum(
        tensor.num_elements
        for name, tensor in tensors.items()
        if tensor.is_weight and not (left_out and name.startswith(left_out))
    )


def _read_header(path: Path, flag: str) -> dict[str, StoredTensor]:
    check_file(path, flag)
    try:
        with safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            return {
                name: StoredTensor(path, part.get_dtype(), tuple(part.get_shape()))
                for name, part in slices.items()
            }
    except (OSError, SafetensorError) as error:
        raise ModelNotFoundError(flag, path, f"not a whole safetensors file: {error}") from None
