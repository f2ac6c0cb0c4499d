"""Loads a module's share of a checkpoint; no other bytes of its files are read."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from hidream_grpc.devices.device import Device
from hidream_grpc.model.checkpoint.weights.files import Library, read_tensors
from hidream_grpc.model.parallel.matrix import Matrix
from hidream_grpc.model.parallel.shards import TensorSlice, parameter_slices
from hidream_grpc.model.quantization import bands, empty_quantized, quantize
from hidream_grpc.model.weight_format import WeightFormat, is_quantized_tensor


class SafetensorsFolder:
    """The weights of one component of diffusers, in one file or several. Use it in a `with` block.

    Attributes:
        tensors: all tensors by name, from the headers of the files.
        bytes_read: bytes of all slices that were read so far.
    """

    def __init__(self, folder: Path) -> None:
        self.tensors = read_tensors(folder, Library.DIFFUSERS)
        self.bytes_read = 0
        self._stack = ExitStack()
        self._files: dict[Path, Any] = {}

    def __enter__(self) -> SafetensorsFolder:
        for path in {tensor.file for tensor in self.tensors.values()}:
            self._files[path] = self._stack.enter_context(safe_open(path, framework="pt"))
        return self

    def __exit__(self, *_error: object) -> None:
        self._stack.close()

    def read(self, part: TensorSlice) -> Tensor:
        """Read one slice of a tensor, in the file's dtype, onto the CPU."""
        tensor = self._files[self.tensors[part.name].file].get_slice(part.name)
        rows = slice(None) if part.rows is None else slice(part.rows.start, part.rows.stop)
        if part.columns is None:
            read: Tensor = tensor[rows]
        else:
            read = tensor[rows, part.columns.start : part.columns.stop]
        self.bytes_read += read.nbytes
        return read


def load_share(
    module: nn.Module, folder: Path, device: Device, weights: WeightFormat = WeightFormat.BFLOAT16
) -> int:
    """Fill a module that was made on the meta device with its share of a checkpoint.

    At most one slice is in memory beside the parameters of the module; of a matrix that is quantized, one
    band of its rows. Where a rank holds some columns of such a matrix, it reads whole rows, since the scale
    of a row is that of all columns: so a rank that is started again needs no other rank.

    Args:
        module: a module whose parameters are `Sharded`, or have the same names in the checkpoint.
        folder: folder of the component.
        device: device of the parameters, which also decides their dtype.
        weights: how to hold each `Matrix` of tensors to which formats apply.

    Returns:
        Number of bytes read from the files.

    Raises:
        ValueError: tensors of the module are missing in the files, or have other shapes there.
    """
    slices = parameter_slices(module)
    with SafetensorsFolder(folder) as files:
        missing = {part.name for parts in slices.values() for part in parts} - files.tensors.keys()
        if missing:
            raise ValueError(f"{folder} holds no tensor {min(missing)} ({len(missing)} are missing)")
        for path, parts in slices.items():
            owner_path, _, name = path.rpartition(".")
            owner = module.get_submodule(owner_path)
            shape = owner.get_parameter(name).shape
            quantized = [part for part in parts if is_quantized_tensor(part.name)]
            if weights.is_quantized and quantized and isinstance(owner, Matrix):
                _load_quantized(files, owner, parts, len(quantized), path, weights, device)
            else:
                owner.register_parameter(name, _read_parameter(files, parts, shape, path, device))
        return files.bytes_read


def _load_quantized(
    files: SafetensorsFolder,
    matrix: Matrix,
    parts: tuple[TensorSlice, ...],
    num_quantized: int,
    path: str,
    weights: WeightFormat,
    device: Device,
) -> None:
    """Quantize the first slices of a matrix, while they are read, and read the others as they are."""
    shape = matrix.weight.shape
    num_rows = [len(_rows_of(files, part)) for part in parts]
    if sum(num_rows) != shape[:-1].numel():
        raise ValueError(f"the tensors of {path} give {sum(num_rows)} rows, {shape[:-1].numel()} are needed")
    quantized, scales = empty_quantized(sum(num_rows[:num_quantized]), shape[-1], weights, device)
    start = 0
    for part in parts[:num_quantized]:
        rows, num_columns = _rows_of(files, part), files.tensors[part.name].shape[1]
        columns = range(num_columns) if part.columns is None else part.columns
        if len(columns) != shape[-1]:
            raise ValueError(f"tensors do not fit into {path}: {len(columns)} columns of {part.name}")
        for band in bands(len(rows), num_columns):
            whole = files.read(TensorSlice(part.name, rows=rows[band]))
            units, scales_of_band = quantize(whole.to(device.torch_device), weights)
            stop = start + len(units)
            quantized[start:stop] = units[:, columns.start : columns.stop]
            scales[start:stop] = scales_of_band
            start = stop
    exact = None
    if rest := parts[num_quantized:]:
        exact_shape = torch.Size((sum(num_rows[num_quantized:]), shape[-1]))
        exact = _read_parameter(files, rest, exact_shape, path, device)
    matrix.hold_quantized(quantized, scales, exact, device)


def _rows_of(files: SafetensorsFolder, part: TensorSlice) -> range:
    return range(files.tensors[part.name].shape[0]) if part.rows is None else part.rows


def _read_parameter(
    files: SafetensorsFolder, parts: tuple[TensorSlice, ...], shape: torch.Size, path: str, device: Device
) -> nn.Parameter:
    parameter = torch.empty(shape, dtype=device.dtype, device=device.torch_device)
    # Slices are stacked along the rows: (G, N, K) is read as (G × N, K).
    flat = parameter.flatten(0, -2) if parameter.dim() > 2 else parameter
    start = 0
    for part in parts:
        read = files.read(part)
        # The weight of a convolution has the same order in the file, whether it is flattened or not.
        read = read.flatten(0, -2) if read.dim() > 2 else read
        stop = start + read.shape[0]
        if flat[start:stop].shape != read.shape:
            sizes = f"{tuple(read.shape)} of {part.name} for {tuple(shape)}"
            raise ValueError(f"tensors do not fit into {path}: {sizes}")
        flat[start:stop] = read
        start = stop
    if start != flat.shape[0]:
        raise ValueError(f"the tensors of {path} give {start} rows, {flat.shape[0]} are needed")
    return nn.Parameter(parameter, requires_grad=False)
