"""One denoising step's forward of the transformer, the library's and ours, on the same inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
import torch
from diffusers import HiDreamImageTransformer2DModel
from torch import Tensor, nn

from hidream_grpc.devices.device import Device
from hidream_grpc.model.checkpoint.files import TransformerConfig
from hidream_grpc.model.costs.steps import Sample
from hidream_grpc.model.parallel.groups import ParallelGroups
from hidream_grpc.model.transformer.conditioning import Conditioning
from hidream_grpc.model.transformer.model import HiDreamTransformer, RankRows

_TIMESTEP = 500.0
_WEIGHT_DEVIATION = 0.02

_Module = TypeVar("_Module", bound=nn.Module)


@dataclass(frozen=True, slots=True)
class ForwardInputs:
    """Arguments of the library's forward for B samples.

    Attributes:
        latents: (B, C, height, width).
        timesteps: (B,), float32, scheduler units.
        t5: (B, tokens, channels of T5).
        llama: (layers, B, tokens, channels of Llama), all layers up to the last one that is read.
        pooled: (B, channels), of both CLIP encoders.
    """

    latents: Tensor
    timesteps: Tensor
    t5: Tensor
    llama: Tensor
    pooled: Tensor


def random_inputs(
    config: Mapping[str, Any], sample: Sample, batch_size: int, device: torch.device, dtype: torch.dtype
) -> ForwardInputs:
    """Normally distributed inputs of samples of one size.

    Args:
        config: content of the transformer's `config.json`.
        sample: size of each.
        batch_size: B.
        device, dtype: of the tensors.
    """

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    t5_channels, llama_channels = config["caption_channels"]
    num_llama_layers = max(config["llama_layers"]) + 1
    return ForwardInputs(
        latents=normal(batch_size, config["in_channels"], sample.height, sample.width),
        timesteps=torch.full((batch_size,), _TIMESTEP, device=device),
        t5=normal(batch_size, sample.num_t5_tokens, t5_channels),
        llama=normal(num_llama_layers, batch_size, sample.num_llama_tokens, llama_channels),
        pooled=normal(batch_size, config["text_emb_dim"]),
    )


def library_transformer(config: Mapping[str, Any], dtype: torch.dtype) -> HiDreamImageTransformer2DModel:
    """The library's transformer on meta."""
    with torch.device("meta"):
        return HiDreamImageTransformer2DModel(**config).to(dtype).eval()


def exact_transformer(
    config: Mapping[str, Any], device: Device, groups: ParallelGroups
) -> HiDreamTransformer:
    """A rank's share of our transformer on meta, in the device's dtype.

    Args:
        config: content of a `config.json`.
        device: of the rank; whose kernels are used.
        groups: the axes of the rank.
    """
    with torch.device("meta"):
        transformer = HiDreamTransformer(msgspec.convert(config, TransformerConfig), groups, device)
    return transformer.to(device.dtype)


def fill_at_random(transformer: _Module, device: torch.device) -> _Module:
    """Give a transformer on meta weights: norms of 1, everything else small and normally distributed."""
    transformer.to_empty(device=device)
    for name, parameter in transformer.named_parameters():
        if "norm" in name:
            nn.init.ones_(parameter)
        else:
            nn.init.normal_(parameter, std=_WEIGHT_DEVIATION)
    return transformer


def library_forward(transformer: HiDreamImageTransformer2DModel, inputs: ForwardInputs) -> Tensor:
    """Run the library's forward; returns the velocity, (B, C, height, width)."""
    velocity: Tensor = transformer(
        hidden_states=inputs.latents,
        timesteps=inputs.timesteps,
        encoder_hidden_states_t5=inputs.t5,
        encoder_hidden_states_llama3=inputs.llama,
        pooled_embeds=inputs.pooled,
        return_dict=False,
    )[0]
    return velocity


def condition(transformer: HiDreamTransformer, inputs: ForwardInputs) -> tuple[Conditioning, ...]:
    """Do for each sample what our forward does once per prompt."""
    layers = sorted(set(transformer.config.llama_layers))
    conditioning = []
    for t5, llama, pooled in zip(inputs.t5, inputs.llama[layers].unbind(1), inputs.pooled, strict=True):
        of_t5, of_llama = transformer.project_captions(t5, llama)
        conditioning.append(Conditioning(transformer.embed_pooled(pooled), of_t5, of_llama))
    return tuple(conditioning)


def rank_rows(
    transformer: HiDreamTransformer,
    inputs: ForwardInputs,
    conditioning: tuple[Conditioning, ...],
    expert_parallel: int = 1,
) -> RankRows:
    """Do what our engine does once a schedule, and collect the samples of a step.

    Args:
        transformer: the transformer of a rank.
        inputs: inputs of this rank's samples.
        conditioning: prompts of the same samples.
        expert_parallel: groups that share the experts; each has as many samples, at the same steps.
    """
    pooled = torch.stack([prompt.pooled for prompt in conditioning] * expert_parallel)
    timesteps = inputs.timesteps.repeat(expert_parallel)
    return RankRows(
        latents=inputs.latents,
        time_and_prompt=transformer.embed_timesteps(timesteps) + pooled,
        conditioning=conditioning,
        unpadded_samples=None,
    )
