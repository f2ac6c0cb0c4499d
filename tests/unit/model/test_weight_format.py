from __future__ import annotations

import math
from collections import Counter

import msgspec
import pytest

from hidream_grpc.model.checkpoint.files import ClipConfig, LlamaConfig, T5Config, TransformerConfig
from hidream_grpc.model.checkpoint.weights.text_encoders import clip_tensors, llama_tensors, t5_tensors
from hidream_grpc.model.checkpoint.weights.transformer import Shapes, transformer_tensors
from hidream_grpc.model.weight_format import WeightFormat, is_quantized_tensor
from scripts.bench.flops import HIDREAM_I1_CONFIG

# Sizes of the released checkpoint.
TENSORS: dict[str, Shapes] = {
    "transformer": transformer_tensors(msgspec.convert(HIDREAM_I1_CONFIG, TransformerConfig)),
    "CLIP-L": clip_tensors(
        ClipConfig(
            projection_dim=768,
            hidden_size=768,
            intermediate_size=3072,
            num_attention_heads=12,
            max_position_embeddings=248,
        )
    ),
    "CLIP-G": clip_tensors(
        ClipConfig(
            projection_dim=1280,
            hidden_size=1280,
            intermediate_size=5120,
            num_hidden_layers=32,
            num_attention_heads=20,
            max_position_embeddings=218,
        )
    ),
    "T5": t5_tensors(
        T5Config(d_model=4096, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu")
    ),
    "Llama": llama_tensors(
        LlamaConfig(model_type="llama", vocab_size=128256, intermediate_size=14336, num_key_value_heads=8)
    ),
}

# What a layer adds, looks up, normalizes or chooses experts by, and the layers at both ends.
KEPT = {
    "transformer": {
        "x_embedder.proj.weight",
        "t_embedder.timestep_embedder.linear_1.weight",
        "t_embedder.timestep_embedder.linear_2.weight",
        "p_embedder.pooled_embedder.linear_1.weight",
        "p_embedder.pooled_embedder.linear_2.weight",
        "final_layer.linear.weight",
        "final_layer.adaLN_modulation.1.weight",
        *(f"double_stream_blocks.{index}.block.ff_i.gate.weight" for index in range(16)),
        *(f"single_stream_blocks.{index}.block.ff_i.gate.weight" for index in range(32)),
    },
    "CLIP-L": {
        "text_model.embeddings.token_embedding.weight",
        "text_model.embeddings.position_embedding.weight",
        "text_projection.weight",
    },
    "CLIP-G": {
        "text_model.embeddings.token_embedding.weight",
        "text_model.embeddings.position_embedding.weight",
        "text_projection.weight",
    },
    "T5": {
        "shared.weight",
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    },
    "Llama": {"model.embed_tokens.weight"},
}


@pytest.mark.parametrize("component", TENSORS)
def test_of_the_matrices_only_embeddings_gates_and_final_layers_stay(component: str) -> None:
    kept = {name for name in TENSORS[component] if not is_quantized_tensor(name)}
    assert {name for name in kept if len(TENSORS[component][name]) > 1} == KEPT[component]
    assert all(len(TENSORS[component][name]) == 2 for name in TENSORS[component].keys() - kept)


def test_llama_is_recognised_by_the_names_of_either_class() -> None:
    for name in TENSORS["Llama"]:
        assert is_quantized_tensor(name.removeprefix("model.")) is is_quantized_tensor(name)


@pytest.mark.parametrize("weights", [WeightFormat.INT8, WeightFormat.FLOAT8])
def test_the_quantized_part_of_the_released_checkpoint_takes_half_its_bytes(weights: WeightFormat) -> None:
    held: Counter[WeightFormat] = Counter()
    for shapes in TENSORS.values():
        for shape in (shape for name, shape in shapes.items() if is_quantized_tensor(name)):
            for each in (WeightFormat.BFLOAT16, weights):
                # The smallest share of a row is that of ten ranks of tensor parallel.
                held[each] += each.matrix_bytes(shape[0], shape[1] // 10, 2)
    assert held[weights] <= 0.52 * held[WeightFormat.BFLOAT16]


def test_nearly_all_weights_of_the_released_checkpoint_are_quantized() -> None:
    sizes = {
        component: (
            sum(math.prod(shape) for name, shape in shapes.items() if is_quantized_tensor(name)),
            sum(map(math.prod, shapes.values())),
        )
        for component, shapes in TENSORS.items()
    }
    assert sizes["transformer"][1] == pytest.approx(17.1e9, rel=0.01)
    for component, least in {"transformer": 0.997, "T5": 0.97, "Llama": 0.92}.items():
        quantized, total = sizes[component]
        assert quantized >= least * total, component
