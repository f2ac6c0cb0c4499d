"""Reads which files hold the weights of a component, and which tensors are in them."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import msgspec
from safetensors import SafetensorError, safe_open

from hidream_grpc.errors import ModelNotFoundError
from hidream_grpc.model.checkpoint.files import MODEL_PATH_FLAG, UNFINISHED_DOWNLOAD, check_file, read_json
from hidream_grpc.model.checkpoint.hub import has_unfinished_download


class Library(StrEnum):
    """The library of a component; the value is its name for the file of the weights."""

    DIFFUSERS = "diffusion_pytorch_model"
    TRANSFORMERS = "model"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a component, as the header of its file describes it.

    Attributes:
        file: path of the file that holds the tensor.
        dtype: name of the dtype in safetensors, such as F32, BF16, F8_E4M3 or I64.
        shape: shape of the tensor.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        """Number of elements of the tensor."""
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        """Size of the tensor in the file."""
        bits = re.search(r"\d+", self.dtype)
        return self.num_elements * (8 if bits is None else int(bits[0])) // 8


class _WeightIndex(msgspec.Struct, frozen=True):
    weight_map: dict[str, str]


class _Place(msgspec.Struct, frozen=True):
    """An entry in the header of a file: where the data of a tensor are; the metadata have none."""

    data_offsets: tuple[int, int] = (0, 0)


_CHUNK_BYTES = 2**20


def weight_files(folder: Path, library: Library, flag: str = MODEL_PATH_FLAG) -> tuple[Path, ...]:
    """List the files that a component is loaded from: its index, if any, and the files with its tensors.

    Other files in the folder are ignored: weights in another precision, such as `model.fp16.safetensors`,
    their index, and an index whose files are gone beside one complete file.

    Raises:
        ModelNotFoundError: there are no such files, or one that the index names is missing.
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
    for path in (single, index):
        if os.path.lexists(path):
            check_file(path, flag)
    but = ""
    if others := sorted(path.name for path in folder.glob("*.safetensors")):
        but = f", but {others[0]}, which is not loaded"
    elif others := sorted(path.name for path in folder.glob("*.bin")):
        but = f", but {others[0]}, which is not read: convert it to safetensors"
    unfinished = UNFINISHED_DOWNLOAD if has_unfinished_download(folder) else ""
    raise ModelNotFoundError(flag, folder, f"no weights: no {single.name}{but}{unfinished}")


def read_tensors(folder: Path, library: Library, flag: str = MODEL_PATH_FLAG) -> dict[str, StoredTensor]:
    """Read the headers of a component's weight files.

    Returns:
        All tensors of the component by name.

    Raises:
        ModelNotFoundError: a file is missing, is no complete safetensors file, or holds a tensor that
            another file holds too.
    """
    tensors: dict[str, StoredTensor] = {}
    for path in weight_files(folder, library, flag):
        if path.suffix != ".safetensors":
            continue
        header = _read_header(path, flag)
        if twice := header.keys() & tensors.keys():
            name = min(twice)
            raise ModelNotFoundError(flag, path, f"holds {name}, which {tensors[name].file.name} holds too")
        tensors |= header
    return tensors


def num_weights(tensors: Mapping[str, StoredTensor]) -> int:
    """Number of elements of all these tensors."""
    return sum(tensor.num_elements for tensor in tensors.values())


def have_equal_data(name: str, other_name: str, tensors: Mapping[str, StoredTensor]) -> bool:
    """Whether two tensors of a component have the same bytes in their files."""
    with ExitStack() as stack:
        streams = []
        for tensor_name in (name, other_name):
            file = stack.enter_context(tensors[tensor_name].file.open("rb"))
            header_bytes = int.from_bytes(file.read(8), "little")
            start, stop = msgspec.json.decode(file.read(header_bytes), type=dict[str, _Place])[
                tensor_name
            ].data_offsets
            file.seek(8 + header_bytes + start)
            streams.append((file, stop - start))
        (file, size_bytes), (other_file, other_size_bytes) = streams
        if size_bytes != other_size_bytes:
            return False
        return all(
            file.read(min(_CHUNK_BYTES, left)) == other_file.read(min(_CHUNK_BYTES, left))
            for left in range(size_bytes, 0, -_CHUNK_BYTES)
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
