"""The diffusion transformer of HiDream-I1, on one rank or many.

Its output is that of diffusers' HiDreamImageTransformer2DModel, for less work. All padding tokens are alike,
so one token that counts as often replaces them. Llama's tokens are dropped after each block, so they are keys
and values only. What depends on the prompt, the schedule or the size alone is computed once.

Legend: B samples, N image tokens (with the padding token, if any, which is the first), T text tokens that
go from block to block, L tokens of Llama that a block appends, each as many as this rank has; D width,
H heads of this rank, C channels of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from hidream_grpc.devices.device import Device
from hidream_grpc.model.checkpoint.files import TransformerConfig
from hidream_grpc.model.checkpoint.weights.transformer import modulations, swiglu_units
from hidream_grpc.model.diffusers_private import (
    HiDreamImageEmbedND,
    HiDreamImagePatchEmbed,
    HiDreamImagePooledEmbed,
    HiDreamImageTimestepEmbed,
)
from hidream_grpc.model.parallel.experts import RoutedExperts
from hidream_grpc.model.parallel.groups import Axis, ParallelGroups
from hidream_grpc.model.parallel.linear import (
    ColumnParallelLinear,
    GatheredLinear,
    RowParallelLinear,
    SwiGLU,
)
from hidream_grpc.model.parallel.norm import ParallelRMSNorm, rms_norms
from hidream_grpc.model.parallel.sequence import gather_tokens, scatter_tokens
from hidream_grpc.model.transformer.caption_projection import CaptionProjection
from hidream_grpc.model.transformer.conditioning import Conditioning
from hidream_grpc.model.transformer.patches import TokenGrid, patchify, unpatchify

_NORM_EPS = 1e-5
_MAX_GRIDS = 16


@dataclass(frozen=True, slots=True)
class RankRows:
    """The samples of one forward, as a rank sees them; all ranks of the expert axis have equally many.

    Attributes:
        latents: (B, C, height, width), latents of this rank's samples.
        time_and_prompt: (B of all ranks of the expert axis, D), timestep embedding plus pooled prompt
            of each sample, in the order of the axis.
        conditioning: prompts of this rank's samples.
        unpadded_samples: indices of the samples of all ranks of the expert axis that are not padding; None
            for all.
    """

    latents: Tensor
    time_and_prompt: Tensor
    conditioning: tuple[Conditioning, ...]
    unpadded_samples: tuple[int, ...] | None


class HiDreamTransformer(nn.Module):
    """One rank's share of the transformer.

    Args:
        config: configuration of the transformer.
        groups: the axes of the layout, whose collectives run in every forward.
        device: the device, whose kernels are used.
    """

    def __init__(self, config: TransformerConfig, groups: ParallelGroups, device: Device) -> None:
        super().__init__()
        self.config = config
        self._groups = groups
        width = config.width
        self.x_embedder = HiDreamImagePatchEmbed(config.patch_size, config.in_channels, width)
        self.t_embedder = HiDreamImageTimestepEmbed(width)
        self.p_embedder = HiDreamImagePooledEmbed(config.text_emb_dim, width)
        self.caption_projection = CaptionProjection(config, groups.model)
        self.double_blocks = nn.ModuleList(
            DoubleBlock(f"double_stream_blocks.{index}.block", config, groups, device)
            for index in range(config.num_layers)
        )
        self.single_blocks = nn.ModuleList(
            SingleBlock(f"single_stream_blocks.{index}.block", config, groups, device)
            for index in range(config.num_single_layers)
        )
        # The modulations of all blocks depend on timestep and pooled prompt alone, so one product gives all.
        names, num_outputs = zip(*modulations(config), strict=True)
        self.modulation = GatheredLinear(groups.model, names, width, num_outputs)
        num_channels = config.out_channels or config.in_channels
        self.final_linear = ColumnParallelLinear(
            ["final_layer.linear"], width, range(config.patch_size**2 * num_channels), bias=True
        )
        self._rotary_embedding = HiDreamImageEmbedND(theta=10000, axes_dim=list(config.axes_dims_rope))
        self._grids: dict[tuple[int, int, int, int], TokenGrid] = {}

    def embed_timesteps(self, timesteps: Tensor) -> Tensor:
        """Map timesteps (S,), in scheduler units, to the (S, D) that steps add to their pooled prompts."""
        embeds: Tensor = self.t_embedder(timesteps, self.x_embedder.proj.weight.dtype)
        return embeds

    def embed_pooled(self, pooled: Tensor) -> Tensor:
        """Map CLIP's pooled output (P,) to (D,)."""
        embeds: Tensor = self.p_embedder(pooled[None])[0]
        return embeds

    def project_captions(self, t5: Tensor, llama: Tensor) -> tuple[Tensor, Tensor]:
        """Project a prompt's states to the transformer's width; all ranks of a model must call it.

        Args:
            t5: (T, channels of T5).
            llama: (layers, L, channels of Llama), the layers that the blocks read, each once, in order.

        Returns:
            (T, D) and (blocks, L, D).
        """
        projected: tuple[Tensor, Tensor] = self.caption_projection(t5, llama)
        return projected

    def forward(self, rows: RankRows) -> Tensor:
        """Predict the velocity of some samples; each gives what it would give alone.

        Returns:
            (B, C, height, width), dtype of the latents.

        Source: diffusers 0.42.1 transformer_hidream_image.py, forward.
        """
        batch = len(rows.latents)
        llama = torch.stack([conditioning.llama for conditioning in rows.conditioning], dim=1)
        text = torch.stack([conditioning.t5 for conditioning in rows.conditioning])
        text = torch.cat((text, llama[-1]), dim=1)
        grid = self._grid(rows.latents, text.shape[1], llama.shape[2])
        # Of the strides that blocks return, so that the first one shares what is compiled for the others.
        text = text[:, grid.text.start : grid.text.stop].contiguous()
        llama = llama[:, :, grid.llama.start : grid.llama.stop]

        first_own = self._groups.expert.index * batch
        modulations = [
            modulation[first_own : first_own + batch, None]
            for modulation in self.modulation(functional.silu(rows.time_and_prompt))
        ]
        unpadded_samples = None
        if rows.unpadded_samples is not None:
            # One copy from the host in a step, none in a block.
            unpadded_samples = torch.tensor(rows.unpadded_samples, device=rows.latents.device)
        image = self.x_embedder(patchify(rows.latents, self.config.patch_size, grid))

        num_double, num_image = len(self.double_blocks), image.shape[1]
        for block, block_llama, modulation in zip(
            self.double_blocks, llama[:num_double], modulations[:num_double], strict=True
        ):
            image, text = block(image, text, block_llama, modulation, grid, unpadded_samples)
        hidden = torch.cat((image, text), dim=1)
        for block, block_llama, modulation in zip(
            self.single_blocks, llama[num_double:], modulations[num_double:-1], strict=True
        ):
            hidden = block(hidden, block_llama, modulation, grid, unpadded_samples)

        shift, scale = modulations[-1].chunk(2, dim=-1)
        (output,) = self.final_linear(_modulated(hidden[:, :num_image], shift, scale))
        output = self._groups.sequence.all_gather_shares(output, grid.num_image_tokens, dim=1)
        return unpatchify(output, self.config.patch_size, grid)

    def _grid(self, latents: Tensor, num_text_tokens: int, num_llama_tokens: int) -> TokenGrid:
        """The positions of this rank's tokens of one size, computed once."""
        rows, columns = (side // self.config.patch_size for side in latents.shape[-2:])
        key = rows, columns, num_text_tokens, num_llama_tokens
        if key not in self._grids:
            if len(self._grids) == _MAX_GRIDS:
                self._grids.pop(next(iter(self._grids)))
            self._grids[key] = TokenGrid.new(
                *key,
                self.config.max_tokens,
                self._groups.sequence,
                self._rotary_embedding,
                latents.device,
            )
        return self._grids[key]


class DoubleBlock(nn.Module):
    """A block in which image and text, with their own weights, attend to both and to Llama's tokens."""

    def __init__(self, name: str, config: TransformerConfig, groups: ParallelGroups, device: Device) -> None:
        super().__init__()
        self._axis = groups.tensor
        self.attn1 = Attention(f"{name}.attn1", config, groups, device, streams=("", "_t"))
        self.ff_i = MixtureOfExperts(f"{name}.ff_i", config, groups, device)
        self.ff_t = SwiGLU(f"{name}.ff_t", groups.tensor, config.width, swiglu_units(4 * config.width))

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        llama: Tensor,
        modulation: Tensor,
        grid: TokenGrid,
        unpadded_samples: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Map (B, N, D) and (B, T, D) to the same; llama: (B, L, D); modulation: (B, 1, 12 D)."""
        image_modulation, text_modulation = modulation.chunk(2, dim=-1)
        shift, scale, gate, ff_shift, ff_scale, ff_gate = image_modulation.chunk(6, dim=-1)
        shift_t, scale_t, gate_t, ff_shift_t, ff_scale_t, ff_gate_t = text_modulation.chunk(6, dim=-1)
        streams = [_modulated(image, shift, scale), _modulated(text, shift_t, scale_t)]
        of_image, of_text = self.attn1(streams, _modulated(llama, shift_t, scale_t), grid)
        image = torch.addcmul(image, gate, of_image)
        text = torch.addcmul(text, gate_t, of_text)
        partial = torch.cat(
            (
                self.ff_i(_modulated(image, ff_shift, ff_scale), unpadded_samples),
                self.ff_t(_modulated(text, ff_shift_t, ff_scale_t)),
            ),
            dim=1,
        )
        lengths = [image.shape[1], text.shape[1]]
        of_image, of_text = torch.split(self._axis.all_reduce(partial), lengths, dim=1)
        return torch.addcmul(image, ff_gate, of_image), torch.addcmul(text, ff_gate_t, of_text)


class SingleBlock(nn.Module):
    """A block in which image and text, as one stream, attend to themselves and to Llama's tokens."""

    def __init__(self, name: str, config: TransformerConfig, groups: ParallelGroups, device: Device) -> None:
        super().__init__()
        self._axis = groups.tensor
        self.attn1 = Attention(f"{name}.attn1", config, groups, device, streams=("",))
        self.ff_i = MixtureOfExperts(f"{name}.ff_i", config, groups, device)

    def forward(
        self,
        hidden: Tensor,
        llama: Tensor,
        modulation: Tensor,
        grid: TokenGrid,
        unpadded_samples: Tensor | None,
    ) -> Tensor:
        """Map (B, N + T, D) to the same; llama: (B, L, D); modulation: (B, 1, 6 D)."""
        shift, scale, gate, ff_shift, ff_scale, ff_gate = modulation.chunk(6, dim=-1)
        (attended,) = self.attn1([_modulated(hidden, shift, scale)], _modulated(llama, shift, scale), grid)
        hidden = torch.addcmul(hidden, gate, attended)
        partial = self.ff_i(_modulated(hidden, ff_shift, ff_scale), unpadded_samples)
        return torch.addcmul(hidden, ff_gate, self._axis.all_reduce(partial))


class Attention(nn.Module):
    """Attention of one or two streams; this rank has some of the heads and of the tokens.

    Args:
        name: name in the checkpoint.
        streams: suffix of the names of each stream's weights; those of the last stream also serve Llama's
            tokens.
    """

    def __init__(
        self,
        name: str,
        config: TransformerConfig,
        groups: ParallelGroups,
        device: Device,
        streams: tuple[str, ...],
    ) -> None:
        super().__init__()
        self._axis, self._sequence = groups.tensor, groups.sequence
        self._device = device
        self._width, self._head_channels = config.width, config.attention_head_dim
        heads = groups.tensor.share(config.num_attention_heads)
        channels = range(heads.start * config.attention_head_dim, heads.stop * config.attention_head_dim)
        self.streams = nn.ModuleList(
            AttentionWeights(name, suffix, config.width, groups.tensor, channels) for suffix in streams
        )

    def forward(self, streams: Sequence[Tensor], llama: Tensor, grid: TokenGrid) -> tuple[Tensor, ...]:
        """Map (B, tokens, D) of each stream, and Llama's (B, L, D), to (B, tokens, D) of each stream."""
        lengths = [stream.shape[1] for stream in streams]
        stream_weights = cast("list[AttentionWeights]", list(self.streams))
        queries, keys, values = [], [], []
        for stream, weights in zip(streams, stream_weights, strict=True):
            query, key, value = weights.query_key_value(stream)
            queries.append((weights.query_norm, query))
            keys.append((weights.key_norm, key))
            values.append(value)
        key, value = stream_weights[-1].query_key_value(llama, first_layer=1)
        keys.append((stream_weights[-1].key_norm, key))
        values.append(value)

        normed = rms_norms(self._axis, self._width, [*queries, *keys])
        query, key, value = (
            self._by_head(torch.cat(parts, dim=1))
            for parts in (normed[: len(queries)], normed[len(queries) :], values)
        )
        if grid.has_padding_token:
            key[:, 0] = 0.0
        num_queries = query.shape[1]
        query = self._device.rotate(query, grid.cosines[:num_queries], grid.sines[:num_queries])
        key = self._device.rotate(key, grid.cosines, grid.sines)
        query, key, value = gather_tokens(
            self._sequence, (query, key, value), (grid.query_counts, grid.key_counts, grid.key_counts)
        )
        attended = self._device.attention(query, key, value, max(grid.padding_count, 1))
        attended = scatter_tokens(self._sequence, attended, grid.query_counts).flatten(-2)

        partial = [
            weights.output(part)
            for weights, part in zip(stream_weights, torch.split(attended, lengths, dim=1), strict=True)
        ]
        return torch.split(self._axis.all_reduce(torch.cat(partial, dim=1)), lengths, dim=1)

    def _by_head(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], -1, self._head_channels)


class AttentionWeights(nn.Module):
    """The projections and norms of one stream."""

    def __init__(self, name: str, suffix: str, width: int, axis: Axis, channels: range) -> None:
        super().__init__()
        names = [f"{name}.to_{kind}{suffix}" for kind in ("q", "k", "v")]
        self.query_key_value = ColumnParallelLinear(names, width, channels, bias=True)
        self.query_norm = ParallelRMSNorm(f"{name}.q_rms_norm{suffix}", channels, _NORM_EPS)
        self.key_norm = ParallelRMSNorm(f"{name}.k_rms_norm{suffix}", channels, _NORM_EPS)
        self.output = RowParallelLinear(f"{name}.to_out{suffix}", axis, channels, width, bias=True)


class MixtureOfExperts(nn.Module):
    """Routed experts and a shared one for every token; the result is this rank's part of the sum."""

    def __init__(self, name: str, config: TransformerConfig, groups: ParallelGroups, device: Device) -> None:
        super().__init__()
        width = config.width
        self.shared_experts = SwiGLU(f"{name}.shared_experts", groups.tensor, width, swiglu_units(2 * width))
        self.experts = RoutedExperts(
            name,
            groups.tensor,
            groups.expert,
            width=width,
            num_hidden=swiglu_units(4 * width),
            num_experts=config.num_routed_experts,
            num_active=config.num_activated_experts,
            grouped_linear=device.grouped_linear,
        )

    def forward(self, tokens: Tensor, unpadded_samples: Tensor | None) -> Tensor:
        """Map (B, tokens, D) to the same, this rank's part of the sum."""
        routed: Tensor = self.experts(tokens, unpadded_samples)
        shared: Tensor = self.shared_experts(tokens)
        return routed + shared


def _modulated(hidden: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return torch.addcmul(shift, functional.layer_norm(hidden, hidden.shape[-1:], eps=1e-6), 1 + scale)
