"""The dimensions of HiDream-I1, as its published checkpoint has them: what can be planned without one."""

from __future__ import annotations

from hidream_grpc.model.checkpoint.configs import CheckpointConfigs
from hidream_grpc.model.checkpoint.files import (
    ClipConfig,
    LlamaConfig,
    SchedulerConfig,
    T5Config,
    TransformerConfig,
    VaeConfig,
)
from hidream_grpc.model.checkpoint.variants import SCHEDULES, Variant

_FULL = SCHEDULES[Variant.FULL]

HIDREAM_I1 = CheckpointConfigs(
    scheduler=SchedulerConfig(name=_FULL.scheduler_name, flow_shift=_FULL.shift),
    transformer=TransformerConfig(
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=16,
        num_single_layers=32,
        attention_head_dim=128,
        num_attention_heads=20,
        caption_channels=(4096, 4096),
        text_emb_dim=2048,
        num_routed_experts=4,
        num_activated_experts=2,
        axes_dims_rope=(64, 32, 32),
        max_resolution=(128, 128),
        llama_layers=(*range(32), *[31] * 16),
    ),
    vae=VaeConfig(
        block_out_channels=(128, 256, 512, 512),
        latent_channels=16,
        layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ),
    clip_l=ClipConfig(
        projection_dim=768,
        hidden_size=768,
        intermediate_size=3072,
        num_attention_heads=12,
        max_position_embeddings=248,
    ),
    clip_g=ClipConfig(
        projection_dim=1280,
        hidden_size=1280,
        intermediate_size=5120,
        num_hidden_layers=32,
        num_attention_heads=20,
        max_position_embeddings=218,
    ),
    t5=T5Config(
        d_model=4096,
        d_ff=10240,
        num_layers=24,
        num_heads=64,
        feed_forward_proj="gated-gelu",
    ),
    llama=LlamaConfig(
        model_type="llama",
        vocab_size=128256,
        intermediate_size=14336,
        num_key_value_heads=8,
    ),
)
"""The configurations of Full, Dev and Fast, which differ in their schedulers alone; this has that of Full."""
