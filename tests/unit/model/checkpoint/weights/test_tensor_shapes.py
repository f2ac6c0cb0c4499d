"""The tensors derived from a configuration are those of the libraries' own modules."""

from __future__ import annotations

import json
from typing import Any, TypeVar

import msgspec
import pytest
import torch
import transformers
from diffusers import AutoencoderKL, HiDreamImageTransformer2DModel
from torch import nn

from hidream_grpc.devices.cpu import CpuDevice
from hidream_grpc.model.checkpoint.files import (
    ClipConfig,
    LlamaConfig,
    T5Config,
    TransformerConfig,
    VaeConfig,
)
from hidream_grpc.model.checkpoint.weights.text_encoders import clip_tensors, llama_tensors, t5_tensors
from hidream_grpc.model.checkpoint.weights.transformer import Shapes, transformer_tensors
from hidream_grpc.model.checkpoint.weights.vae import vae_tensors
from hidream_grpc.model.parallel.groups import ParallelGroups
from hidream_grpc.model.parallel.layout import Layout
from hidream_grpc.model.parallel.shards import parameter_slices
from hidream_grpc.model.transformer.model import HiDreamTransformer
from scripts.bench.flops import HIDREAM_I1_CONFIG

Config = TypeVar("Config")

TRANSFORMERS = {
    "released": {**HIDREAM_I1_CONFIG},
    "no output channels of its own": {**HIDREAM_I1_CONFIG}
    | {"out_channels": None, "num_layers": 1, "num_single_layers": 2, "llama_layers": [0, 1, 1]},
    "other sizes": {**HIDREAM_I1_CONFIG}
    | {
        "patch_size": 4,
        "num_layers": 2,
        "num_single_layers": 1,
        "num_attention_heads": 3,
        "attention_head_dim": 24,
        "caption_channels": [48, 40],
        "text_emb_dim": 24,
        "num_routed_experts": 6,
        "llama_layers": [0, 1, 1],
    },
}


def shapes_of(module: nn.Module) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def ours(config: dict[str, Any], config_type: type[Config]) -> Config:
    return msgspec.json.decode(json.dumps(config), type=config_type)


@pytest.mark.parametrize("config", TRANSFORMERS.values(), ids=list(TRANSFORMERS))
def test_the_transformer_of_the_library_has_these_tensors(config: dict[str, Any]) -> None:
    with torch.device("meta"):
        module = HiDreamImageTransformer2DModel(**config)
    assert transformer_tensors(ours(config, TransformerConfig)) == shapes_of(module)


@pytest.mark.parametrize("config", TRANSFORMERS.values(), ids=list(TRANSFORMERS))
def test_a_rank_reads_every_one_of_them_and_no_other(config: dict[str, Any]) -> None:
    described = ours(config, TransformerConfig)
    with torch.device("meta"):
        module = HiDreamTransformer(described, ParallelGroups(Layout()), CpuDevice())
    read = {part.name for parts in parameter_slices(module).values() for part in parts}
    assert read == transformer_tensors(described).keys()


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"norm_num_groups": 32, "block_out_channels": [128, 256, 512, 512]}, id="released"),
        pytest.param({"use_quant_conv": True, "use_post_quant_conv": True}, id="convolutions of latents"),
        pytest.param({"mid_block_add_attention": False, "layers_per_block": 1}, id="no attention"),
        pytest.param({"block_out_channels": [8], "in_channels": 4, "out_channels": 1}, id="one block"),
    ],
)
def test_the_autoencoder_of_the_library_has_these_tensors(changes: dict[str, Any]) -> None:
    config = {
        "block_out_channels": [8, 16, 24],
        "layers_per_block": 2,
        "latent_channels": 16,
        "norm_num_groups": 4,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        **changes,
    }
    num_blocks = len(config["block_out_channels"])
    config["down_block_types"] = ["DownEncoderBlock2D"] * num_blocks
    config["up_block_types"] = ["UpDecoderBlock2D"] * num_blocks
    with torch.device("meta"):
        module = AutoencoderKL(**config)
    assert vae_tensors(ours(config, VaeConfig)) == shapes_of(module)


@pytest.mark.parametrize(
    "config",
    [
        pytest.param({"projection_dim": 768}, id="the library's defaults"),
        pytest.param(
            {
                "projection_dim": 24,
                "vocab_size": 50,
                "hidden_size": 32,
                "intermediate_size": 40,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "max_position_embeddings": 248,
            },
            id="other sizes",
        ),
    ],
)
def test_the_clip_of_the_library_has_these_tensors(config: dict[str, Any]) -> None:
    with torch.device("meta"):
        module = transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**config))
    assert clip_tensors(ours(config, ClipConfig)) == shapes_of(module)


@pytest.mark.parametrize(
    "config",
    [
        pytest.param({"d_model": 512}, id="the library's defaults"),
        pytest.param(
            {
                "d_model": 32,
                "d_kv": 6,
                "d_ff": 40,
                "num_layers": 2,
                "num_heads": 4,
                "vocab_size": 60,
                "relative_attention_num_buckets": 16,
                "feed_forward_proj": "gated-gelu",
            },
            id="other sizes",
        ),
    ],
)
def test_the_t5_of_the_library_has_these_tensors(config: dict[str, Any]) -> None:
    with torch.device("meta"):
        module = transformers.T5EncoderModel(transformers.T5Config(**config))
    shapes = shapes_of(module)
    # The same matrix under another name.
    assert shapes.pop("encoder.embed_tokens.weight") == shapes["shared.weight"]
    assert t5_tensors(ours(config, T5Config)) == shapes


@pytest.mark.parametrize(
    "config",
    [
        pytest.param({}, id="the library's defaults"),
        pytest.param(
            {
                "vocab_size": 70,
                "hidden_size": 32,
                "intermediate_size": 40,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 12,
                "attention_bias": True,
                "mlp_bias": True,
            },
            id="other sizes",
        ),
    ],
)
def test_the_llama_of_the_library_has_these_tensors(config: dict[str, Any]) -> None:
    with torch.device("meta"):
        module = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    shapes = shapes_of(module)
    shapes.pop("lm_head.weight")
    assert llama_tensors(ours({"model_type": "llama"} | config, LlamaConfig)) == shapes
