"""The internals of diffusers that a rank depends on; any version of diffusers may change them.

What is imported here comes from modules of the library that it does not document.

Source: diffusers 0.42.1.
"""

from __future__ import annotations

from diffusers import SchedulerMixin
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_hidream_image import (
    HiDreamImageEmbedND,
    HiDreamImagePatchEmbed,
    HiDreamImagePooledEmbed,
    HiDreamImageTimestepEmbed,
)
from diffusers.models.unets.unet_2d_blocks import UpDecoderBlock2D
from diffusers.models.upsampling import Upsample2D
from diffusers.pipelines.hidream_image.pipeline_hidream_image import calculate_shift

__all__ = [
    "HiDreamImageEmbedND",
    "HiDreamImagePatchEmbed",
    "HiDreamImagePooledEmbed",
    "HiDreamImageTimestepEmbed",
    "ResnetBlock2D",
    "UpDecoderBlock2D",
    "Upsample2D",
    "calculate_shift",
    "set_steps_done",
]


def set_steps_done(scheduler: SchedulerMixin, num_steps: int) -> None:
    """Bring the step index of a scheduler to where it is after some steps."""
    # None before the first step: the begin index then says where the scheduler is.
    scheduler._step_index = num_steps or None
