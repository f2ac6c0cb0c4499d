"""Quantized weights stand for the same numbers on every rank, and take half the bytes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import cast

import msgspec
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from hidream_grpc.devices import kernels
from hidream_grpc.devices.cpu import CpuDevice
from hidream_grpc.model import quantization
from hidream_grpc.model.checkpoint.files import TransformerConfig
from hidream_grpc.model.parallel.matrix import Matrix
from hidream_grpc.model.parallel.shards import TensorSlice, parameter_slices
from hidream_grpc.model.transformer.model import AttentionWeights, DoubleBlock, HiDreamTransformer
from hidream_grpc.model.weight_format import WeightFormat, is_quantized_tensor
from hidream_grpc.model.weights import load_share
from tests.numerics.test_shares import transformer_of

QUANTIZED = [WeightFormat.INT8, WeightFormat.FLOAT8]
# Of the largest weight of a row: half a step of int8, half a step of float8's 3 bits of mantissa.
LARGEST_ERROR = {WeightFormat.INT8: 0.505 / 127, WeightFormat.FLOAT8: 1.01 / 2**4}

in_each_format = pytest.mark.parametrize("weights", QUANTIZED)


@pytest.fixture(autouse=True)
def small_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny matrices are quantized and used in several bands, as those of the released model are."""
    monkeypatch.setattr(quantization, "MAX_BAND_WEIGHTS", 500)
    monkeypatch.setattr(kernels, "MAX_DEQUANTIZED_WEIGHTS", 700)


def loaded(folder: Path, layout: str, rank: int, weights: WeightFormat) -> HiDreamTransformer:
    config = msgspec.json.decode((folder / "config.json").read_bytes(), type=TransformerConfig)
    share = transformer_of(config, layout, rank)
    load_share(share, folder, CpuDevice(), weights)
    return share


def dequantized(matrix: Matrix) -> Tensor:
    """All rows of a matrix, groups one below another."""
    if matrix.scales is None:
        return matrix.weight.flatten(0, -2)
    rows = kernels.dequantize(matrix.weight, matrix.scales).flatten(0, -2)
    return rows if matrix.exact is None else torch.cat((rows, matrix.exact))


def matrices(transformer: HiDreamTransformer) -> Iterator[tuple[str, Matrix]]:
    return ((name, part) for name, part in transformer.named_modules() if isinstance(part, Matrix))


@in_each_format
@pytest.mark.parametrize("layout", ["tp=1", "tp=4", "tp=2,ep=2"])
def test_every_rank_holds_its_slices_of_the_one_quantized_checkpoint(
    layout: str, weights: WeightFormat, tiny_checkpoint: Path
) -> None:
    folder = tiny_checkpoint / "transformer"
    (path,) = folder.glob("*.safetensors")
    stored = load_file(path)
    whole = {}
    for name, tensor in stored.items():
        whole[name] = tensor
        if is_quantized_tensor(name):
            units, scales = quantization.quantize(tensor, weights)
            whole[name] = units.float() * scales[:, None]
            row_maxima = tensor.abs().amax(dim=1, keepdim=True)
            assert ((whole[name] - tensor).abs() <= LARGEST_ERROR[weights] * row_maxima).all()
            assert not torch.equal(whole[name], tensor)
    for rank in range(4 if layout != "tp=1" else 1):
        share = loaded(folder, layout, rank, weights)
        slices = parameter_slices(share)
        for name, matrix in matrices(share):
            expected = torch.cat(
                [
                    whole[part.name][
                        slice(None) if part.rows is None else slice(part.rows.start, part.rows.stop),
                        slice(None) if part.columns is None else slice(part.columns.start, part.columns.stop),
                    ]
                    for part in slices[f"{name}.weight"]
                ]
            )
            assert torch.equal(dequantized(matrix), expected), name


@in_each_format
def test_products_are_those_of_the_dequantized_matrices(weights: WeightFormat, tiny_checkpoint: Path) -> None:
    folder = tiny_checkpoint / "transformer"
    quantized = loaded(folder, "tp=1", 0, weights)
    exact = loaded(folder, "tp=1", 0, WeightFormat.BFLOAT16)
    for (name, matrix), (_, of_exact) in zip(matrices(quantized), matrices(exact), strict=True):
        of_exact.weight.copy_(dequantized(matrix).view_as(of_exact.weight))
        assert (matrix.scales is not None) is (name != "final_linear.matrix")
    rows = torch.randn(2, 9, exact.config.width)
    block, of_exact_block = (cast(DoubleBlock, each.double_blocks[0]) for each in (quantized, exact))
    assert_close(block.ff_i(rows, None), of_exact_block.ff_i(rows, None))
    for mine, expected in zip(quantized.modulation(rows[0]), exact.modulation(rows[0]), strict=True):
        assert_close(mine, expected)
    stream, of_exact_stream = (
        cast(AttentionWeights, each.attn1.streams[0]) for each in (block, of_exact_block)
    )
    for first_layer in (0, 1):
        for mine, expected in zip(
            stream.query_key_value(rows, first_layer),
            of_exact_stream.query_key_value(rows, first_layer),
            strict=True,
        ):
            assert_close(mine, expected)
    t5, llama = torch.randn(5, 32), torch.randn(2, 7, 32)
    for mine, expected in zip(
        quantized.project_captions(t5, llama), exact.project_captions(t5, llama), strict=True
    ):
        assert_close(mine, expected)


@in_each_format
def test_a_rank_without_hidden_units_loads_and_adds_nothing(
    weights: WeightFormat, tiny_checkpoint: Path
) -> None:
    """A model with few hidden units leaves some ranks of a long tensor axis none."""
    experts = [f"double_stream_blocks.0.block.ff_i.experts.{expert}" for expert in range(2)]
    none, width = range(64, 64), 32
    share = nn.Module()
    share.up = Matrix([TensorSlice(f"{name}.w1.weight", rows=none) for name in experts], 2, 0, width)
    share.down = Matrix([TensorSlice(f"{name}.w2.weight", columns=none) for name in experts], 2, width, 0)
    share.linear_down = Matrix([TensorSlice(f"{experts[0]}.w2.weight", columns=none)], width, 0)
    share.to("meta")
    load_share(share, tiny_checkpoint / "transformer", CpuDevice(), weights)
    rows, ends = torch.randn(5, width), torch.tensor([2, 5], dtype=torch.int32)
    hidden = share.up.grouped_linear(rows, ends, kernels.grouped_linear)
    assert hidden.shape == (5, 0)
    for outputs in (
        share.down.grouped_linear(hidden, ends, kernels.grouped_linear),
        share.linear_down.linear(hidden),
    ):
        assert torch.equal(outputs, torch.zeros(5, width))


def assert_close(mine: Tensor, expected: Tensor) -> None:
    assert (mine - expected).abs().max() <= 1e-6 * expected.abs().max()
