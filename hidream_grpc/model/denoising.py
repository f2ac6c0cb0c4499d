"""What the denoising loop carries from step to step: one state per request, one batch per step.

Legend of shapes: N images of a request, B rows of a batch (samples), C latent channels; H and W are
those of the latents, an eighth of the image's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import SchedulerMixin
from torch import Tensor

from hidream_grpc.model.parameters import GenerationParameters
from hidream_grpc.model.text_encoders import PromptEmbeds


@dataclass(slots=True)
class DenoisingState:
    """One request in the middle of its denoising. `HiDreamModel.advance` alone changes it.

    Attributes:
        parameters: of the request.
        latents: (N, C, H, W), model dtype, on the model's device.
        scheduler: this request's own.
        generators: one per image, on the CPU, so that a seed means the same on every device.
        prompt_embeds: of the prompt.
        negative_prompt_embeds: of the negative prompt; None without guidance.
        step: denoising steps done.
    """

    parameters: GenerationParameters
    latents: Tensor
    scheduler: SchedulerMixin
    generators: tuple[torch.Generator, ...]
    prompt_embeds: PromptEmbeds
    negative_prompt_embeds: PromptEmbeds | None
    step: int = 0

    @property
    def is_denoised(self) -> bool:
        """Whether all steps are done."""
        return self.step == self.parameters.num_inference_steps

    @property
    def timestep(self) -> Tensor:
        """(), the scheduler's timestep of the step to come."""
        timestep: Tensor = self.scheduler.timesteps[self.step]
        return timestep


@dataclass(frozen=True, slots=True)
class StepBatch:
    """All rows of one denoising step, those of one request next to each other.

    With guidance a request has two rows per image: all unconditional ones, then all conditional ones.

    Attributes:
        latents: (B, C, H, W), model dtype.
        timesteps: (B,), float32, scheduler units (0 to 1000).
        prompt_embeds: of each row.
    """

    latents: Tensor
    timesteps: Tensor
    prompt_embeds: tuple[PromptEmbeds, ...]

    @property
    def num_samples(self) -> int:
        """B."""
        return len(self.prompt_embeds)

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """(C, H, W)."""
        return tuple(self.latents.shape[1:])

    @property
    def dtype(self) -> torch.dtype:
        """Of latents and noise predictions."""
        return self.latents.dtype
