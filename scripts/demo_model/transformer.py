"""The demo model's transformer: its size, its start, and a differentiable forward for training.

Legend: B batch, N image tokens, T text tokens, D model width, C latent channels.

The library's routed experts run under `no_grad`, so training needs a twin of its forward that reads
the same weights. The twin multiplies matrices in bfloat16 and collapses the identical padding tokens
of images that are not square into one.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import HiDreamImageTransformer2DModel
from torch import Tensor, nn
from torch.nn import functional

from scripts.demo_model.text_encoders import CAPTION_DIM, POOLED_DIM, PromptEmbeddings
from scripts.demo_model.vae import LATENT_CHANNELS

PATCH = 2
NUM_HEADS = 4
HEAD_DIM = 24
# The first axis is always zero for images; rows and columns get the rest.
ROPE_AXES = (4, 10, 10)
MAX_RESOLUTION = (128, 128)
LLAMA_LAYER_OF_BLOCK = (0, 1, 2, 2, 2, 2)
NUM_DOUBLE_BLOCKS = 4
_GATE_START = 0.3
_ROWS_MULTIPLE = 128


def new_transformer() -> HiDreamImageTransformer2DModel:
    """An untrained transformer whose output starts near minus its input, a good first guess."""
    transformer = HiDreamImageTransformer2DModel(
        patch_size=PATCH,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=NUM_DOUBLE_BLOCKS,
        num_single_layers=len(LLAMA_LAYER_OF_BLOCK) - NUM_DOUBLE_BLOCKS,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=NUM_HEADS,
        caption_channels=[CAPTION_DIM, CAPTION_DIM],
        text_emb_dim=POOLED_DIM,
        num_routed_experts=4,
        num_activated_experts=2,
        axes_dims_rope=ROPE_AXES,
        max_resolution=MAX_RESOLUTION,
        llama_layers=list(LLAMA_LAYER_OF_BLOCK),
    )
    width = NUM_HEADS * HEAD_DIM
    with torch.no_grad():
        for block in [*transformer.double_stream_blocks, *transformer.single_stream_blocks]:
            modulation = block.block.adaLN_modulation[1]
            modulation.weight.zero_()
            modulation.bias.zero_()
            # shift, scale, gate of attention, then of the feed-forward; twice where there is a text stream.
            modulation.bias.view(-1, 3, width)[:, 2] = _GATE_START
        embedder = transformer.x_embedder.proj
        nn.init.orthogonal_(embedder.weight)
        embedder.bias.zero_()
        final = transformer.final_layer
        final.adaLN_modulation[1].weight.zero_()
        final.adaLN_modulation[1].bias.zero_()
        # The final LayerNorm divides by the embedded input's root mean square.
        final.linear.weight.copy_(-math.sqrt(embedder.in_features / width) * embedder.weight.T)
        final.linear.bias.zero_()
    return transformer


def patchify(latents: Tensor) -> Tensor:
    """(B, C, H, W) latents to (B, N, 4 C) tokens, in the library's order."""
    batch, channels, height, width = latents.shape
    tokens = latents.view(batch, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return tokens.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, PATCH * PATCH * channels)


@dataclass(frozen=True)
class TokenLayout:
    """What depends on sizes alone: positions, and how often the padding token counts.

    cosines, sines: (N + text tokens, D / 2), in rotary order.
    bias: (N + text tokens,), added to every key's logits: log of its count; None for square images.
    keys: (N + text tokens, 1), 0 for padding, 1 elsewhere; None for square images.
    """

    cosines: Tensor
    sines: Tensor
    bias: Tensor | None
    keys: Tensor | None


def token_layout(height: int, width: int, num_text_tokens: int) -> TokenLayout:
    """The layout of latents of height x width pixels and three texts of `num_text_tokens`."""
    rows, columns = height // PATCH, width // PATCH
    is_padded = rows != columns
    count = rows * columns + int(is_padded) + 3 * num_text_tokens
    positions = torch.zeros(count, 3, dtype=torch.float64)
    index = torch.arange(rows * columns)
    positions[: rows * columns, 1] = index // columns
    positions[: rows * columns, 2] = index % columns
    angles = []
    for axis, dim in enumerate(ROPE_AXES):
        frequencies = 10000.0 ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        angles.append(positions[:, axis, None] * frequencies)
    angle = torch.cat(angles, dim=-1).repeat(1, NUM_HEADS)
    bias = keys = None
    if is_padded:
        num_padding = MAX_RESOLUTION[0] * MAX_RESOLUTION[1] // PATCH**2 - rows * columns
        bias, keys = torch.zeros(count), torch.ones(count, 1)
        bias[rows * columns] = math.log(num_padding)
        keys[rows * columns] = 0.0
    return TokenLayout(angle.cos().float(), angle.sin().float(), bias, keys)


def _linear(layer: Any, hidden: Tensor) -> Tensor:
    bias = None if layer.bias is None else layer.bias.bfloat16()
    return functional.linear(hidden.bfloat16(), layer.weight.bfloat16(), bias)


def _modulated(hidden: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return functional.layer_norm(hidden, hidden.shape[-1:], eps=1e-6) * (1 + scale) + shift


def _rotary_order() -> Tensor:
    """Channels so that all heads' rotary pairs lie as two contiguous halves: (2, heads, head dim / 2)."""
    return torch.arange(NUM_HEADS * HEAD_DIM).view(NUM_HEADS, HEAD_DIM // 2, 2).permute(2, 0, 1).flatten()


_ROTARY_ORDER = _rotary_order()


def _normalised_projection(layer: Any, norm: Any, hidden: Tensor) -> Tensor:
    """Projection and RMSNorm of queries or keys, channels in rotary order (attention does not mind)."""
    weight, bias = layer.weight[_ROTARY_ORDER].bfloat16(), layer.bias[_ROTARY_ORDER].bfloat16()
    projected = functional.linear(hidden, weight, bias).float()
    return functional.rms_norm(projected, projected.shape[-1:], norm.weight[_ROTARY_ORDER], norm.eps)


def _rotate(projected: Tensor, layout: TokenLayout) -> Tensor:
    """(B, N + T, D) in rotary order to rotated heads, (B * heads, N + T, D / heads), bfloat16."""
    first, second = projected.chunk(2, dim=-1)
    cosines, sines = layout.cosines, layout.sines
    rotated = torch.cat(
        (first * cosines - second * sines, first * sines + second * cosines), dim=-1
    ).bfloat16()
    heads = rotated.unflatten(-1, (2, NUM_HEADS, HEAD_DIM // 2)).permute(0, 3, 1, 2, 4)
    return heads.reshape(-1, projected.shape[1], HEAD_DIM)


def _attend(query: Tensor, key: Tensor, value: Tensor, layout: TokenLayout) -> Tensor:
    """Queries, keys (in rotary order) and values, (B, N + T, D), to attention output of the same shape."""
    batch, count, width = query.shape
    if layout.keys is not None:
        key = key * layout.keys
    query, key = _rotate(query * HEAD_DIM**-0.5, layout), _rotate(key, layout)
    value = value.unflatten(-1, (NUM_HEADS, HEAD_DIM)).transpose(1, 2).reshape(-1, count, HEAD_DIM)
    # Written out: on this CPU the fused kernel's backward pass is four times slower in bfloat16.
    logits = torch.bmm(query, key.transpose(1, 2))
    if layout.bias is not None:
        logits = logits + layout.bias.bfloat16()
    attended = torch.bmm(logits.softmax(-1), value)
    return attended.view(batch, NUM_HEADS, count, HEAD_DIM).transpose(1, 2).reshape(batch, count, width)


def _swiglu(module: Any, hidden: Tensor) -> Tensor:
    return _linear(module.w2, functional.silu(_linear(module.w1, hidden)) * _linear(module.w3, hidden))


def _experts(module: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Routed and shared experts of (B, N, D); also the load-balance loss of the routing."""
    tokens = hidden.flatten(0, 1)
    scores = functional.linear(tokens, module.gate.weight).softmax(-1)
    top_k = module.gate.top_k
    chosen = scores >= scores.topk(top_k, dim=-1).values[:, -1:]
    balance = scores.shape[-1] * (scores.mean(0) * chosen.float().mean(0)).sum() / top_k
    tokens = tokens.bfloat16()
    output = _swiglu(module.shared_experts, tokens).float()
    for index, expert in enumerate(module.experts):
        rows = chosen[:, index].nonzero()[:, 0]
        # oneDNN compiles a kernel for every new number of rows: fill up with the first row, weighing nothing.
        num_filling = -len(rows) % _ROWS_MULTIPLE
        rows = functional.pad(rows, (0, num_filling))
        weights = scores[:, index, None].index_select(0, rows)
        weights = weights * (torch.arange(len(rows))[:, None] < len(rows) - num_filling)
        output = output.index_add(0, rows, weights * _swiglu(expert, tokens.index_select(0, rows)))
    return output.view_as(hidden), balance


def _double_block(
    block: Any, image: Tensor, text: Tensor, temb: Tensor, layout: TokenLayout
) -> tuple[Tensor, Tensor, Tensor]:
    shift, scale, gate, mlp_shift, mlp_scale, mlp_gate, *of_text = block.adaLN_modulation(temb)[
        :, None
    ].chunk(12, -1)
    shift_t, scale_t, gate_t, mlp_shift_t, mlp_scale_t, mlp_gate_t = of_text
    attention = block.attn1
    image_in = _modulated(image, scale, shift).bfloat16()
    text_in = _modulated(text, scale_t, shift_t).bfloat16()
    query = torch.cat(
        (
            _normalised_projection(attention.to_q, attention.q_rms_norm, image_in),
            _normalised_projection(attention.to_q_t, attention.q_rms_norm_t, text_in),
        ),
        dim=1,
    )
    key = torch.cat(
        (
            _normalised_projection(attention.to_k, attention.k_rms_norm, image_in),
            _normalised_projection(attention.to_k_t, attention.k_rms_norm_t, text_in),
        ),
        dim=1,
    )
    value = torch.cat((_linear(attention.to_v, image_in), _linear(attention.to_v_t, text_in)), dim=1)
    attended = _attend(query, key, value, layout)
    num_image_tokens = image.shape[1]
    image = image + gate * _linear(attention.to_out, attended[:, :num_image_tokens])
    text = text + gate_t * _linear(attention.to_out_t, attended[:, num_image_tokens:])
    routed, balance = _experts(block.ff_i, _modulated(image, mlp_scale, mlp_shift))
    image = image + mlp_gate * routed
    text = text + mlp_gate_t * _swiglu(block.ff_t, _modulated(text, mlp_scale_t, mlp_shift_t).bfloat16())
    return image, text, balance


def _single_block(block: Any, hidden: Tensor, temb: Tensor, layout: TokenLayout) -> tuple[Tensor, Tensor]:
    shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = block.adaLN_modulation(temb)[:, None].chunk(6, -1)
    attention = block.attn1
    inside = _modulated(hidden, scale, shift).bfloat16()
    query = _normalised_projection(attention.to_q, attention.q_rms_norm, inside)
    key = _normalised_projection(attention.to_k, attention.k_rms_norm, inside)
    attended = _attend(query, key, _linear(attention.to_v, inside), layout)
    hidden = hidden + gate * _linear(attention.to_out, attended)
    routed, balance = _experts(block.ff_i, _modulated(hidden, mlp_scale, mlp_shift))
    return hidden + mlp_gate * routed, balance


def training_forward(
    transformer: HiDreamImageTransformer2DModel,
    tokens: Tensor,
    timesteps: Tensor,
    embeddings: PromptEmbeddings,
    layout: TokenLayout,
) -> tuple[Tensor, Tensor]:
    """The library's forward, differentiable.

    Args:
        transformer: whose weights to use, float32.
        tokens: (B, N, 4 C) noisy latents, patchified.
        timesteps: (B,), 0 to 1000.
        embeddings: of the B prompts.
        layout: of the same sizes.

    Returns:
        (B, N, 4 C), data minus noise; and the mean load-balance loss, 1 when balanced.
    """
    temb = transformer.t_embedder(timesteps, torch.float32) + transformer.p_embedder(embeddings.pooled)
    num_image_tokens = tokens.shape[1]
    if layout.keys is not None:
        tokens = functional.pad(tokens, (0, 0, 0, 1))
    image = transformer.x_embedder(tokens)
    projections = transformer.caption_projection
    llama = [projections[block](embeddings.llama[layer]) for block, layer in enumerate(LLAMA_LAYER_OF_BLOCK)]
    text = torch.cat((projections[-1](embeddings.t5), llama[-1]), dim=1)
    balances = []
    for index, block in enumerate(transformer.double_stream_blocks):
        image, all_text, balance = _double_block(
            block.block, image, torch.cat((text, llama[index]), dim=1), temb, layout
        )
        text = all_text[:, : text.shape[1]]
        balances.append(balance)
    hidden = torch.cat((image, text), dim=1)
    for index, block in enumerate(transformer.single_stream_blocks, start=NUM_DOUBLE_BLOCKS):
        whole, balance = _single_block(block.block, torch.cat((hidden, llama[index]), dim=1), temb, layout)
        hidden = whole[:, : hidden.shape[1]]
        balances.append(balance)
    output = transformer.final_layer(hidden[:, :num_image_tokens], temb)
    return output, torch.stack(balances).mean()
