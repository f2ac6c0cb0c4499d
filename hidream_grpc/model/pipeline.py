"""HiDream-I1 on one device: encode, denoise step by step, decode.

A denoising step is `collect`, `predict`, `advance`. Between the first two and the last, ranks divide
the rows among themselves; nothing here knows of ranks.

Legend of shapes: N images of a request, B rows of a batch (samples), C latent channels; H and W are
those of the latents, an eighth of the image's.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, HiDreamImageTransformer2DModel, SchedulerMixin
from numpy.typing import NDArray
from torch import Tensor

from hidream_grpc.devices.base import Device
from hidream_grpc.model.denoising import DenoisingState, StepBatch
from hidream_grpc.model.images import encode_image
from hidream_grpc.model.loading import load_module, load_scheduler, quieten_libraries
from hidream_grpc.model.parameters import GenerationParameters, OutputFormat
from hidream_grpc.model.preview import LatentPreview
from hidream_grpc.model.schedulers import new_scheduler, scheduler_step
from hidream_grpc.model.text_encoders import TextEncoders

_PREVIEW_QUALITY = 80


class HiDreamModel:
    """A loaded checkpoint. Not safe to call from two threads at once.

    Attributes:
        scheduler_name: class of the checkpoint's scheduler in diffusers.
        shift: of the scheduler's timesteps.
        num_parameters: weights of all components.
    """

    def __init__(
        self,
        text_encoders: TextEncoders,
        transformer: HiDreamImageTransformer2DModel,
        vae: AutoencoderKL,
        scheduler: SchedulerMixin,
        device: Device,
    ) -> None:
        self.scheduler_name = type(scheduler).__name__
        self.shift = float(getattr(scheduler.config, "flow_shift", None) or scheduler.config.shift)
        self.num_parameters = sum(
            parameter.numel()
            for module in (*text_encoders.modules(), transformer, vae)
            for parameter in module.parameters()
        )
        self._text_encoders = text_encoders
        self._transformer = transformer
        self._vae = vae
        self._vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self._scheduler = scheduler
        self._device = device
        self._llama_layers = _distinct_llama_layers(transformer)
        self._preview = LatentPreview.fit(vae)

    @classmethod
    def from_pretrained(cls, model_path: Path, extra_model_path: Path | None, device: Device) -> HiDreamModel:
        """Load a checkpoint that `describe_checkpoint` has accepted, from local files alone.

        Args:
            model_path: a HiDream-I1 in diffusers format.
            extra_model_path: the Llama folder, where the checkpoint holds none.
            device: where it runs, and in which dtype.
        """
        quieten_libraries()
        transformer = load_module(HiDreamImageTransformer2DModel, model_path / "transformer", device)
        return cls(
            text_encoders=TextEncoders.from_pretrained(
                model_path, extra_model_path, _distinct_llama_layers(transformer), device
            ),
            transformer=transformer,
            vae=load_module(AutoencoderKL, model_path / "vae", device),
            scheduler=load_scheduler(model_path / "scheduler"),
            device=device,
        )

    @torch.inference_mode()
    def begin(self, parameters: GenerationParameters) -> DenoisingState:
        """Encode the prompts of a request and draw its first latents.

        Image i is drawn from seed + i, whatever else is in the request. (torch's generator on a CPU
        takes the lower 32 bits of a seed.)

        Args:
            parameters: of the request; its size is drawn exactly.

        Raises:
            ValueError: width or height is not a multiple of a token's side.
        """
        token_side = self._vae_scale_factor * self._transformer.config.patch_size
        if parameters.width % token_side or parameters.height % token_side:
            raise ValueError(
                f"width and height must be multiples of {token_side}, "
                f"not {parameters.width} and {parameters.height}"
            )
        generators = tuple(
            torch.Generator().manual_seed(parameters.seed + index) for index in range(parameters.num_images)
        )
        shape = (
            self._transformer.config.in_channels,
            parameters.height // self._vae_scale_factor,
            parameters.width // self._vae_scale_factor,
        )
        latents = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
        encode = self._text_encoders.encode
        return DenoisingState(
            parameters=parameters,
            latents=latents.to(self._device.torch_device, self._device.dtype),
            scheduler=new_scheduler(
                self._scheduler, parameters.num_inference_steps, self._transformer.max_seq
            ),
            generators=generators,
            prompt_embeds=encode(parameters.prompt),
            negative_prompt_embeds=encode(parameters.negative_prompt) if parameters.uses_guidance else None,
        )

    @torch.inference_mode()
    def collect(self, states: Sequence[DenoisingState]) -> StepBatch:
        """Gather the rows of the next step of some requests.

        Args:
            states: at least one, all of one size, each at its own step.

        Raises:
            ValueError: they differ in size.
        """
        if len({state.latents.shape[1:] for state in states}) != 1:
            raise ValueError("requests of one step must have one size")
        latents, timesteps, prompt_embeds = [], [], []
        for state in states:
            for embeds in (state.negative_prompt_embeds, state.prompt_embeds):
                if embeds is not None:
                    latents.append(state.latents)
                    timesteps.append(state.timestep.float().expand(len(state.latents)))
                    prompt_embeds.extend([embeds] * len(state.latents))
        return StepBatch(
            latents=torch.cat(latents),
            timesteps=torch.cat(timesteps).to(self._device.torch_device),
            prompt_embeds=tuple(prompt_embeds),
        )

    @torch.inference_mode()
    def predict(self, batch: StepBatch, rows: range) -> Tensor:
        """Predict the noise in some rows of a batch: one forward of the transformer.

        Rows may stand at different steps; each gives what it would give alone.

        Args:
            batch: of one step.
            rows: which of them, contiguous; may be empty.

        Returns:
            (len(rows), C, H, W), model dtype.

        Source: diffusers 0.42.1 pipeline_hidream_image.py, the loop of `__call__` (its sign change of
            the output is done here).
        """
        latents = batch.latents[rows.start : rows.stop]
        if not rows:
            return torch.empty_like(latents)
        prompt_embeds = batch.prompt_embeds[rows.start : rows.stop]
        llama = torch.stack([embeds.llama for embeds in prompt_embeds], dim=1)
        velocity: Tensor = self._transformer(
            hidden_states=latents,
            timesteps=batch.timesteps[rows.start : rows.stop],
            encoder_hidden_states_t5=torch.stack([embeds.t5 for embeds in prompt_embeds]),
            # The transformer looks layers up by their number; those that it never reads are not kept.
            encoder_hidden_states_llama3=dict(zip(self._llama_layers, llama, strict=True)),
            pooled_embeds=torch.stack([embeds.pooled for embeds in prompt_embeds]),
            return_dict=False,
        )[0]
        return -velocity

    @torch.inference_mode()
    def advance(self, states: Sequence[DenoisingState], batch: StepBatch, noise_prediction: Tensor) -> None:
        """Take every request of a batch one denoising step further.

        Args:
            states: those that the batch was collected from, in the same order.
            batch: of this step.
            noise_prediction: (B, C, H, W), of all its rows.

        Raises:
            ValueError: the prediction is not one of this batch.
        """
        if noise_prediction.shape != batch.latents.shape:
            raise ValueError(f"{tuple(noise_prediction.shape)} for {tuple(batch.latents.shape)} latents")
        num_samples = [state.parameters.num_samples for state in states]
        for state, prediction in zip(states, torch.split(noise_prediction, num_samples), strict=True):
            if state.parameters.uses_guidance:
                unconditional, conditional = prediction.chunk(2)
                prediction = unconditional + state.parameters.guidance_scale * (conditional - unconditional)
            state.latents = scheduler_step(
                state.scheduler, prediction, state.timestep, state.latents, state.generators
            )
            state.step += 1

    @torch.inference_mode()
    def decode(self, state: DenoisingState, image_index: int) -> NDArray[np.uint8]:
        """Turn the latents of one image into pixels.

        Args:
            state: of a request, fully denoised or not.
            image_index: 0 to num_images - 1.

        Returns:
            (height, width, 3), RGB.
        """
        latents = state.latents[image_index : image_index + 1]
        latents = latents / self._vae.config.scaling_factor + (self._vae.config.shift_factor or 0.0)
        image = self._vae.decode(latents, return_dict=False)[0][0]
        image = (image * 0.5 + 0.5).clamp(0.0, 1.0).movedim(0, -1).float().cpu()
        pixels: NDArray[np.uint8] = (image * 255.0).round().to(torch.uint8).numpy()
        return pixels

    def preview(self, state: DenoisingState) -> bytes:
        """A small JPEG of the current latents of image 0."""
        return encode_image(self._preview.draw(state.latents[0]), OutputFormat.JPEG, _PREVIEW_QUALITY)


def _distinct_llama_layers(transformer: HiDreamImageTransformer2DModel) -> tuple[int, ...]:
    """Layers of Llama that the transformer reads, each once; many blocks read the last one."""
    return tuple(sorted(set(transformer.config.llama_layers)))
