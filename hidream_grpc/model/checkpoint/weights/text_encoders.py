"""The tensors of the text encoders, derived from their configurations."""

from __future__ import annotations

from hidream_grpc.model.checkpoint.files import ClipConfig, LlamaConfig, T5Config
from hidream_grpc.model.checkpoint.weights.transformer import Shapes, linear


def clip_tensors(config: ClipConfig) -> Shapes:
    """The shape of every tensor, by its name in a checkpoint.

    Source: transformers 5.24 modeling_clip.py, CLIPTextModelWithProjection.
    """
    width = config.hidden_size
    shapes: Shapes = {
        "text_model.embeddings.token_embedding.weight": (config.vocab_size, width),
        "text_model.embeddings.position_embedding.weight": (config.max_position_embeddings, width),
        **_norm("text_model.final_layer_norm", width),
        **linear("text_projection", width, config.projection_dim, bias=False),
    }
    for index in range(config.num_hidden_layers):
        name = f"text_model.encoder.layers.{index}"
        for kind in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= linear(f"{name}.self_attn.{kind}", width, width)
        shapes |= _norm(f"{name}.layer_norm1", width) | _norm(f"{name}.layer_norm2", width)
        shapes |= linear(f"{name}.mlp.fc1", width, config.intermediate_size)
        shapes |= linear(f"{name}.mlp.fc2", config.intermediate_size, width)
    return shapes


def t5_tensors(config: T5Config) -> Shapes:
    """The shape of every tensor, by its name in a checkpoint.

    Source: transformers 5.24 modeling_t5.py, T5EncoderModel.
    """
    width, inner = config.d_model, config.num_heads * config.d_kv
    is_gated = config.feed_forward_proj.startswith("gated-")
    shapes: Shapes = {
        "shared.weight": (config.vocab_size, width),
        "encoder.final_layer_norm.weight": (width,),
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (
            config.relative_attention_num_buckets,
            config.num_heads,
        ),
    }
    for index in range(config.num_layers):
        attention, feed_forward = (f"encoder.block.{index}.layer.{layer}" for layer in range(2))
        shapes |= {f"{layer}.layer_norm.weight": (width,) for layer in (attention, feed_forward)}
        for kind in ("q", "k", "v"):
            shapes |= linear(f"{attention}.SelfAttention.{kind}", width, inner, bias=False)
        shapes |= linear(f"{attention}.SelfAttention.o", inner, width, bias=False)
        for kind in ("wi_0", "wi_1") if is_gated else ("wi",):
            shapes |= linear(f"{feed_forward}.DenseReluDense.{kind}", width, config.d_ff, bias=False)
        shapes |= linear(f"{feed_forward}.DenseReluDense.wo", config.d_ff, width, bias=False)
    return shapes


def llama_tensors(config: LlamaConfig) -> Shapes:
    """The shape of every tensor, by its name in a checkpoint.

    Source: transformers 5.24 modeling_llama.py, LlamaForCausalLM without its head.
    """
    width, num_heads = config.hidden_size, config.num_attention_heads
    head_dim = config.head_dim or width // num_heads
    inner, inner_kv = num_heads * head_dim, (config.num_key_value_heads or num_heads) * head_dim
    shapes: Shapes = {
        "model.embed_tokens.weight": (config.vocab_size, width),
        "model.norm.weight": (width,),
    }
    for index in range(config.num_hidden_layers):
        name = f"model.layers.{index}"
        shapes[f"{name}.input_layernorm.weight"] = (width,)
        shapes[f"{name}.post_attention_layernorm.weight"] = (width,)
        for kind, num_inputs, num_outputs in (
            ("q_proj", width, inner),
            ("k_proj", width, inner_kv),
            ("v_proj", width, inner_kv),
            ("o_proj", inner, width),
        ):
            shapes |= linear(f"{name}.self_attn.{kind}", num_inputs, num_outputs, bias=config.attention_bias)
        for kind in ("gate_proj", "up_proj"):
            shapes |= linear(f"{name}.mlp.{kind}", width, config.intermediate_size, bias=config.mlp_bias)
        shapes |= linear(f"{name}.mlp.down_proj", config.intermediate_size, width, bias=config.mlp_bias)
    return shapes


def _norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}
