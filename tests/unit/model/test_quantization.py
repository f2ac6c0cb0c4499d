from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import CLIPTextModelWithProjection, LlamaModel, PreTrainedModel, T5EncoderModel

from hidream_grpc.devices import kernels
from hidream_grpc.devices.cpu import CpuDevice
from hidream_grpc.model.checkpoint.text_encoders import TextEncoderName, text_encoder_files
from hidream_grpc.model.loading import load_module
from hidream_grpc.model.quantization import QuantizedLinear, quantize
from hidream_grpc.model.weight_format import WeightFormat, is_quantized_tensor

CLASSES: dict[TextEncoderName, type[PreTrainedModel]] = {
    TextEncoderName.CLIP_G: CLIPTextModelWithProjection,
    TextEncoderName.T5: T5EncoderModel,
    TextEncoderName.LLAMA: LlamaModel,
}

in_each_format = pytest.mark.parametrize("weights", [WeightFormat.INT8, WeightFormat.FLOAT8])


class HalfPrecisionCpu(CpuDevice):
    """A CPU that computes in bfloat16, as accelerators do."""

    dtype = torch.bfloat16


@in_each_format
def test_quantizing_is_symmetric_and_exact_for_zeros_and_the_largest_weights(weights: WeightFormat) -> None:
    # 127 and 448 times a number of few bits, so that the scale is that number.
    largest = {WeightFormat.INT8: 127 * 0.25, WeightFormat.FLOAT8: 448 * 0.25}[weights]
    rows = torch.tensor([[0.0, 0.0, 0.0], [largest, -largest, 0.0], [1e-44, 0.0, -1e-44]])
    units, scales = quantize(rows, weights)
    assert units.element_size() == 1
    assert torch.equal(kernels.dequantize(units, scales)[:2], rows[:2])
    assert torch.equal(quantize(-rows, weights)[0].float(), -units.float())
    assert scales.tolist()[:2] == [1.0, 0.25]
    assert (kernels.dequantize(units, scales)[2].abs() <= 1e-43).all()


@in_each_format
def test_scales_are_numbers_of_bfloat16_and_the_matrix_is_left_alone(weights: WeightFormat) -> None:
    rows = torch.randn(50, 30)
    before = rows.clone()
    _, scales = quantize(rows, weights)
    assert torch.equal(scales.bfloat16().float(), scales)
    assert torch.equal(rows, before)
    assert torch.equal(quantize(rows.double(), weights)[1], scales)


@in_each_format
@pytest.mark.parametrize("name", CLASSES)
def test_a_quantized_text_encoder_computes_with_its_dequantized_weights(
    name: TextEncoderName, weights: WeightFormat, tiny_checkpoint: Path
) -> None:
    files = text_encoder_files(tiny_checkpoint, None, 2)[name]
    quantized = load_module(CLASSES[name], files.folder, CpuDevice(), weights)
    exact = load_module(CLASSES[name], files.folder, CpuDevice())
    num_layers = 0
    for path, layer in exact.named_modules():
        if isinstance(layer, nn.Linear) and is_quantized_tensor(f"{path}.weight"):
            units, scales = quantize(layer.weight, weights)
            layer.weight.data = kernels.dequantize(units, scales)
            assert isinstance(quantized.get_submodule(path), QuantizedLinear)
            num_layers += 1
    assert num_layers >= 6
    tokens = {"input_ids": torch.arange(3, 12)[None], "attention_mask": torch.ones(1, 9, dtype=torch.int64)}
    with torch.inference_mode():
        torch.testing.assert_close(quantized(**tokens)[0], exact(**tokens)[0], rtol=1e-5, atol=1e-5)


@in_each_format
@pytest.mark.parametrize("name", CLASSES)
def test_a_quantized_text_encoder_holds_the_bytes_that_are_counted(
    name: TextEncoderName, weights: WeightFormat, tiny_checkpoint: Path
) -> None:
    files = text_encoder_files(tiny_checkpoint, None, 2)[name]
    device = HalfPrecisionCpu()
    module = load_module(CLASSES[name], files.folder, device, weights)
    held = sum(parameter.nbytes for parameter in module.parameters())
    assert held == weights.component_bytes(files.shapes, device.dtype.itemsize)
    exact = load_module(CLASSES[name], files.folder, device)
    # What is no weight, such as frequencies of positions, keeps the precision that the library gives it.
    assert {path: buffer.dtype for path, buffer in module.named_buffers()} == {
        path: buffer.dtype for path, buffer in exact.named_buffers()
    }
    assert module.dtype == exact.dtype
    tokens = torch.arange(3, 12)[None]
    with torch.inference_mode():
        mine, expected = module(input_ids=tokens)[0], exact(input_ids=tokens)[0]
    assert mine.dtype == expected.dtype == torch.bfloat16
    assert (mine - expected).norm() <= 0.2 * expected.norm()
