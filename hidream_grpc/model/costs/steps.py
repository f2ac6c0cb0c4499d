"""What a denoising step costs each rank of a layout: floating-point operations, and bytes sent.

A multiply-add counts as two operations; what is no matrix product (norms, activations, RoPE, softmax) counts
as nothing, as with torch's own counter. Bytes are those of ring algorithms, which send least: each rank's
part of the data goes past every other rank once, and twice where it is summed and the sum given to all.
`tests/numerics/test_layout_costs.py` holds both against real ranks.

Letters as in the shapes: N image tokens (with the padding token, if any), T text tokens that live from block
to block (T5's, and those of Llama's last layer).
"""

from __future__ import annotations

from dataclasses import dataclass

from hidream_grpc.model.checkpoint.files import TransformerConfig
from hidream_grpc.model.checkpoint.prompt_lengths import TRAINED_PROMPT_TOKENS
from hidream_grpc.model.checkpoint.weights.transformer import modulations, swiglu_units
from hidream_grpc.model.costs.ranks import RankPlace
from hidream_grpc.model.parallel.layout import HIDDEN_UNITS_MULTIPLE, Layout

_FLOAT32_BYTES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Size of one sample, which is a row of a step.

    Attributes:
        height, width: height and width of the latents.
        num_t5_tokens, num_llama_tokens: tokens of the prompt, padding included.
    """

    height: int
    width: int
    num_t5_tokens: int = TRAINED_PROMPT_TOKENS
    num_llama_tokens: int = TRAINED_PROMPT_TOKENS

    @property
    def is_square(self) -> bool:
        """Whether the library leaves the sample unpadded."""
        return self.height == self.width

    @property
    def num_text_tokens(self) -> int:
        """T, the text tokens that live from block to block."""
        return self.num_t5_tokens + self.num_llama_tokens

    def num_image_tokens(self, config: TransformerConfig) -> int:
        """N, the image tokens, one of which stands for all padding where there is some."""
        num_tokens = self.height * self.width // config.patch_size**2
        is_padded = not self.is_square and num_tokens < config.max_tokens
        return num_tokens + 1 if is_padded else num_tokens


@dataclass(frozen=True, slots=True)
class StepCosts:
    """What one step costs one rank.

    Attributes:
        flops: floating-point operations, a multiply-add as two; with expert parallel on the average, since
            the gate decides which rank computes a token.
        bytes_sent: bytes sent in all collectives of the step.
    """

    flops: int
    bytes_sent: int


def step_costs(
    config: TransformerConfig,
    layout: Layout,
    rank: int,
    sample: Sample,
    num_rows: int,
    bytes_per_number: int,
) -> StepCosts:
    """Count what one step costs one rank.

    Args:
        config: the configuration of the transformer.
        layout: the layout of all ranks.
        rank: the rank in the world.
        sample: size of each row.
        num_rows: rows of the step on all ranks together: two for each image with guidance, else one.
        bytes_per_number: size of the dtype that ranks compute in.
    """
    place = RankPlace.of(layout, rank)
    return StepCosts(
        flops=_flops(config, place, sample, num_rows),
        bytes_sent=_bytes_sent(config, place, sample, num_rows, bytes_per_number),
    )


def max_step_costs(
    config: TransformerConfig, layout: Layout, sample: Sample, num_rows: int, bytes_per_number: int
) -> StepCosts:
    """Count the most that a step costs any rank: the first rank of each axis has the largest shares."""
    return step_costs(config, layout, 0, sample, num_rows, bytes_per_number)


def own_tokens(config: TransformerConfig, place: RankPlace, sample: Sample) -> tuple[int, int, int]:
    """How many tokens a rank has of a sample: of its image, of its text, and of Llama's in each block."""
    image, text, llama = (
        place.token_share(count)
        for count in (sample.num_image_tokens(config), sample.num_text_tokens, sample.num_llama_tokens)
    )
    return image, text, llama


def _flops(config: TransformerConfig, place: RankPlace, sample: Sample, num_rows: int) -> int:
    own_rows, routed_rows = place.rows(num_rows)
    if not own_rows:
        return 0
    width = config.width
    image, text, llama = own_tokens(config, place, sample)
    busy = image + text
    channels = len(place.tensor_share(config.num_attention_heads)) * config.attention_head_dim

    # Of the tokens of Llama that a block appends there are keys and values only.
    projections = channels * width * (4 * busy + 2 * llama)
    # Of all tokens, for this rank's share of the heads.
    num_queries = sample.num_image_tokens(config) + sample.num_text_tokens
    num_keys = num_queries + sample.num_llama_tokens
    scores_and_values = 2 * num_queries * num_keys * channels // place.layout.sequence_parallel
    attention = own_rows * (projections + scores_and_values)
    ends = image * config.patch_size**2 * (config.in_channels + (config.out_channels or config.in_channels))
    num_modulations = len(place.model_share(sum(outputs for _, outputs in modulations(config))))

    def feed_forward(hidden_dim: int) -> int:
        return 3 * width * len(place.tensor_share(swiglu_units(hidden_dim), HIDDEN_UNITS_MULTIPLE))

    def mixture(tokens: int) -> int:
        pairs = (
            routed_rows
            * tokens
            * config.num_activated_experts
            * len(place.expert_share(config.num_routed_experts))
            // config.num_routed_experts
        )
        return (
            routed_rows * tokens * width * config.num_routed_experts
            + pairs * feed_forward(4 * width)
            + own_rows * tokens * feed_forward(2 * width)
        )

    multiply_adds = (
        own_rows * ends * width
        + own_rows * place.layout.expert_parallel * width * num_modulations
        + config.num_layers * (attention + mixture(image) + own_rows * text * feed_forward(4 * width))
        + config.num_single_layers * (attention + mixture(busy))
    )
    return 2 * multiply_adds


def _bytes_sent(
    config: TransformerConfig, place: RankPlace, sample: Sample, num_rows: int, bytes_per_number: int
) -> int:
    layout = place.layout
    own_rows, _ = place.rows(num_rows)
    out_channels = config.out_channels or config.in_channels
    sample_bytes = out_channels * sample.height * sample.width * bytes_per_number
    # The first sample group has most rows, and all send as many.
    most_rows = -(-num_rows // layout.num_sample_groups)
    rows = (layout.num_sample_groups - 1) * most_rows * sample_bytes
    if not own_rows:
        return rows

    width, expert_size, sequence_size = config.width, layout.expert_parallel, layout.sequence_parallel
    image, text, llama = own_tokens(config, place, sample)
    busy = image + text
    largest_share = -(-sum(outputs for _, outputs in modulations(config)) // place.model_size)
    modulation = (place.model_size - 1) * own_rows * expert_size * largest_share * bytes_per_number

    num_normed = own_rows * (2 * busy + llama)
    mean_squares = _all_reduce(layout, num_normed * max(bytes_per_number, _FLOAT32_BYTES))
    hidden = _all_reduce(layout, own_rows * busy * width * bytes_per_number)
    # Queries, keys and values of own tokens for other heads, then what own heads make of other tokens.
    num_queries = sample.num_image_tokens(config) + sample.num_text_tokens
    exchanged = (sequence_size - 1) * (busy + 2 * (busy + llama)) + num_queries - busy
    channels = len(place.tensor_share(config.num_attention_heads)) * config.attention_head_dim
    tokens_for_heads = own_rows * exchanged * (channels // sequence_size) * bytes_per_number
    block = mean_squares + 2 * hidden + tokens_for_heads
    # Tokens are gathered, and what the experts of all ranks make of them is summed.
    token_bytes = 2 * (expert_size - 1) * own_rows * width * bytes_per_number
    experts = token_bytes * (config.num_layers * image + config.num_single_layers * busy)
    largest_part = -(-sample.num_image_tokens(config) // sequence_size)
    output = (sequence_size - 1) * own_rows * largest_part * config.patch_size**2 * out_channels
    return rows + modulation + config.num_blocks * block + experts + output * bytes_per_number


def _all_reduce(layout: Layout, num_bytes: int) -> int:
    """Bytes that a rank sends to sum over the tensor axis, and to get the sum."""
    return 2 * (layout.tensor_parallel - 1) * num_bytes // layout.tensor_parallel
