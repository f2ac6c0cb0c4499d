"""The state of the denoising loop: one state per request, one batch per step.

Legend of shapes: N images of a request, B rows of a batch (samples), C latent channels; H and W are
those of the latents, an eighth of the image's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from diffusers import SchedulerMixin
from torch import Tensor

from hidream_grpc.model.parameters import GenerationParameters
from hidream_grpc.model.transformer.conditioning import Conditioning


@dataclass(slots=True)
class DenoisingState:
    """One request in the middle of its denoising; only `HiDreamModel.advance` changes it.

    Attributes:
        parameters: parameters of the request.
        latents: (N, C, H, W), model dtype, on the model's device.
        scheduler: scheduler of this request alone.
        generators: one per image, on the CPU, so that a seed means the same on every device.
        timestep_embeds: (steps, D), the embedding that each step adds to the pooled prompt.
        conditioning: the encoded prompt.
        negative_conditioning: the encoded negative prompt; None without guidance.
        step: number of denoising steps done.
    """

    parameters: GenerationParameters
    latents: Tensor
    scheduler: SchedulerMixin
    generators: tuple[torch.Generator, ...]
    timestep_embeds: Tensor
    conditioning: Conditioning
    negative_conditioning: Conditioning | None
    step: int = 0

    @property
    def timestep(self) -> Tensor:
        """The scheduler's timestep of the next step, of shape ()."""
        timestep: Tensor = self.scheduler.timesteps[self.step]
        return timestep


@dataclass(frozen=True, slots=True)
class StepBatch:
    """All rows of one denoising step.

    With guidance a request has two rows per image. The unconditional rows of all requests come first, in
    the order of the requests, so that ranks that divide the rows divide the halves of the guidance.

    Attributes:
        latents: (B, C, H, W), model dtype.
        time_and_prompt: (B, D), timestep embedding plus pooled prompt.
        conditioning: the encoded prompt of each row.
    """

    latents: Tensor
    time_and_prompt: Tensor
    conditioning: tuple[Conditioning, ...]

    @classmethod
    def collect(cls, states: Sequence[DenoisingState]) -> StepBatch:
        """Gather the rows of the next step of some requests.

        Args:
            states: at least one state, all of one size and length of prompts, each at its own step.

        Raises:
            ValueError: the states differ in size, or in the length of their prompts.
        """
        if len({state.latents.shape[1:] for state in states}) != 1:
            raise ValueError("requests of one step must have one size")
        halves = [(s, s.negative_conditioning) for s in states if s.negative_conditioning]
        halves += [(state, state.conditioning) for state in states]
        if len({conditioning.num_tokens for _, conditioning in halves}) != 1:
            raise ValueError("prompts of one step must be padded to one length")
        return cls(
            latents=torch.cat([state.latents for state, _ in halves]),
            time_and_prompt=torch.cat(
                [
                    (state.timestep_embeds[state.step] + conditioning.pooled).expand(len(state.latents), -1)
                    for state, conditioning in halves
                ]
            ),
            conditioning=tuple(
                conditioning for state, conditioning in halves for _ in range(len(state.latents))
            ),
        )

    def by_request(
        self, states: Sequence[DenoisingState], rows: Tensor
    ) -> Iterator[tuple[Tensor | None, Tensor]]:
        """Split a result for these rows by request.

        Args:
            states: the states that the batch was collected from, in the same order.
            rows: (B, ...), the result for each row.

        Yields:
            For each request its unconditional rows, None without guidance, and its conditional ones.

        Raises:
            ValueError: the result does not have the rows of this batch.
        """
        if rows.shape[0] != self.num_samples:
            raise ValueError(f"{rows.shape[0]} rows for a batch of {self.num_samples}")
        guided = [len(state.latents) for state in states if state.negative_conditioning]
        unconditional, conditional = rows[: sum(guided)], rows[sum(guided) :]
        of_guided = iter(torch.split(unconditional, guided))
        for state, of_prompt in zip(
            states, torch.split(conditional, [len(state.latents) for state in states]), strict=True
        ):
            yield next(of_guided) if state.negative_conditioning else None, of_prompt

    @property
    def num_samples(self) -> int:
        """Number of rows, B."""
        return len(self.conditioning)


@torch.inference_mode()
def have_finite_latents(states: Sequence[DenoisingState]) -> list[bool]:
    """Find out whether the latents of each request are free of NaN and infinity; wait for the device.

    Args:
        states: at least one state.
    """
    are_finite: list[bool] = torch.stack([state.latents.isfinite().all() for state in states]).tolist()
    return are_finite
