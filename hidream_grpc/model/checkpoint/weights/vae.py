"""The tensors of the autoencoder, derived from its configuration."""

from __future__ import annotations

from itertools import pairwise

from hidream_grpc.model.checkpoint.files import VaeConfig
from hidream_grpc.model.checkpoint.weights.transformer import Shapes, linear


def vae_tensors(config: VaeConfig) -> Shapes:
    """The shape of every tensor, by its name in a checkpoint.

    Source: diffusers 0.42.1 autoencoder_kl.py, AutoencoderKL; vae.py, Encoder and Decoder.
    """
    latent_channels = config.latent_channels
    shapes = _half(config, "encoder", config.in_channels, 2 * latent_channels)
    shapes |= _half(config, "decoder", latent_channels, config.out_channels)
    if config.use_quant_conv:
        shapes |= _convolution("quant_conv", 2 * latent_channels, 2 * latent_channels, 1)
    if config.use_post_quant_conv:
        shapes |= _convolution("post_quant_conv", latent_channels, latent_channels, 1)
    return shapes


def _half(config: VaeConfig, name: str, num_inputs: int, num_outputs: int) -> Shapes:
    """The tensors of the encoder, or of the decoder: its blocks are in reverse, with one more layer each."""
    is_encoder = name == "encoder"
    channels = config.block_out_channels if is_encoder else config.block_out_channels[::-1]
    block, sampler = ("down_blocks", "downsamplers") if is_encoder else ("up_blocks", "upsamplers")
    num_layers = config.layers_per_block + (0 if is_encoder else 1)
    middle = config.block_out_channels[-1]

    shapes = _convolution(f"{name}.conv_in", num_inputs, channels[0])
    for index, (before, after) in enumerate(pairwise((channels[0], *channels))):
        for layer in range(num_layers):
            shapes |= _resnet(f"{name}.{block}.{index}.resnets.{layer}", after if layer else before, after)
        if index < len(channels) - 1:
            shapes |= _convolution(f"{name}.{block}.{index}.{sampler}.0.conv", after, after)
    for layer in range(2):
        shapes |= _resnet(f"{name}.mid_block.resnets.{layer}", middle, middle)
    if config.mid_block_add_attention:
        attention = f"{name}.mid_block.attentions.0"
        shapes |= _norm(f"{attention}.group_norm", middle)
        for kind in ("to_q", "to_k", "to_v", "to_out.0"):
            shapes |= linear(f"{attention}.{kind}", middle, middle)
    return (
        shapes
        | _norm(f"{name}.conv_norm_out", channels[-1])
        | _convolution(f"{name}.conv_out", channels[-1], num_outputs)
    )


def _resnet(name: str, num_inputs: int, num_outputs: int) -> Shapes:
    shapes = {
        **_norm(f"{name}.norm1", num_inputs),
        **_convolution(f"{name}.conv1", num_inputs, num_outputs),
        **_norm(f"{name}.norm2", num_outputs),
        **_convolution(f"{name}.conv2", num_outputs, num_outputs),
    }
    if num_inputs != num_outputs:
        shapes |= _convolution(f"{name}.conv_shortcut", num_inputs, num_outputs, 1)
    return shapes


def _convolution(name: str, num_inputs: int, num_outputs: int, size: int = 3) -> Shapes:
    return {f"{name}.weight": (num_outputs, num_inputs, size, size), f"{name}.bias": (num_outputs,)}


def _norm(name: str, num_channels: int) -> Shapes:
    return {f"{name}.weight": (num_channels,), f"{name}.bias": (num_channels,)}
