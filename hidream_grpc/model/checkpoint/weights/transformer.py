"""The tensors of the transformer, derived from its configuration."""

from __future__ import annotations

from collections.abc import Iterator

from hidream_grpc.model.checkpoint.files import TransformerConfig

Shapes = dict[str, tuple[int, ...]]

FREQUENCY_CHANNELS = 256


def transformer_tensors(config: TransformerConfig) -> Shapes:
    """The shape of every tensor, by its name in a checkpoint.

    Source: diffusers 0.42.1 transformer_hidream_image.py, HiDreamImageTransformer2DModel.
    """
    width, patch_area = config.width, config.patch_size**2
    t5_channels, llama_channels = config.caption_channels
    shapes = {
        **linear("x_embedder.proj", patch_area * config.in_channels, width),
        **linear("t_embedder.timestep_embedder.linear_1", FREQUENCY_CHANNELS, width),
        **linear("t_embedder.timestep_embedder.linear_2", width, width),
        **linear("p_embedder.pooled_embedder.linear_1", config.text_emb_dim, width),
        **linear("p_embedder.pooled_embedder.linear_2", width, width),
        **linear("final_layer.linear", width, patch_area * (config.out_channels or config.in_channels)),
    }
    for name, num_outputs in modulations(config):
        shapes |= linear(name, width, num_outputs)
    for index in range(config.num_blocks):
        shapes |= linear(f"caption_projection.{index}.linear", llama_channels, width, bias=False)
    # The projection of T5 is numbered as that of one more block.
    shapes |= linear(f"caption_projection.{config.num_blocks}.linear", t5_channels, width, bias=False)
    for index in range(config.num_layers):
        name = f"double_stream_blocks.{index}.block"
        shapes |= _attention(f"{name}.attn1", "", width) | _attention(f"{name}.attn1", "_t", width)
        shapes |= _mixture_of_experts(f"{name}.ff_i", config)
        shapes |= _swiglu(f"{name}.ff_t", width, swiglu_units(4 * width))
    for index in range(config.num_single_layers):
        name = f"single_stream_blocks.{index}.block"
        shapes |= _attention(f"{name}.attn1", "", width) | _mixture_of_experts(f"{name}.ff_i", config)
    return shapes


def modulations(config: TransformerConfig) -> Iterator[tuple[str, int]]:
    """Name and number of outputs of each layer that modulates a block, and of the final layer."""
    for index in range(config.num_layers):
        yield f"double_stream_blocks.{index}.block.adaLN_modulation.1", 12 * config.width
    for index in range(config.num_single_layers):
        yield f"single_stream_blocks.{index}.block.adaLN_modulation.1", 6 * config.width
    yield "final_layer.adaLN_modulation.1", 2 * config.width


def swiglu_units(hidden_dim: int) -> int:
    """Number of hidden units of a SwiGLU whose nominal width is `hidden_dim`.

    Source: diffusers 0.42.1 transformer_hidream_image.py, HiDreamImageFeedForwardSwiGLU.
    """
    multiple = 256
    return -(-int(2 * hidden_dim / 3) // multiple) * multiple


def linear(name: str, num_inputs: int, num_outputs: int, *, bias: bool = True) -> Shapes:
    """The tensors of one linear layer."""
    weight: Shapes = {f"{name}.weight": (num_outputs, num_inputs)}
    return weight | {f"{name}.bias": (num_outputs,)} if bias else weight


def _attention(name: str, suffix: str, width: int) -> Shapes:
    shapes: Shapes = {f"{name}.{kind}_rms_norm{suffix}.weight": (width,) for kind in ("q", "k")}
    for kind in ("to_q", "to_k", "to_v", "to_out"):
        shapes |= linear(f"{name}.{kind}{suffix}", width, width)
    return shapes


def _mixture_of_experts(name: str, config: TransformerConfig) -> Shapes:
    width = config.width
    shapes = linear(f"{name}.gate", width, config.num_routed_experts, bias=False)
    shapes |= _swiglu(f"{name}.shared_experts", width, swiglu_units(2 * width))
    for expert in range(config.num_routed_experts):
        shapes |= _swiglu(f"{name}.experts.{expert}", width, swiglu_units(4 * width))
    return shapes


def _swiglu(name: str, width: int, num_units: int) -> Shapes:
    return {
        **linear(f"{name}.w1", width, num_units, bias=False),
        **linear(f"{name}.w2", num_units, width, bias=False),
        **linear(f"{name}.w3", width, num_units, bias=False),
    }
