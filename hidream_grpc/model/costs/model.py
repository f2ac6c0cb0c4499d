"""What any layout of one model costs its ranks: memory, operations, bytes sent, time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from hidream_grpc.devices.device_types import CPU, MAX_DEQUANTIZED_WEIGHTS, DeviceSpeed, DeviceType
from hidream_grpc.model.checkpoint.configs import CheckpointConfigs
from hidream_grpc.model.checkpoint.prompt_lengths import TRAINED_PROMPT_TOKENS, padded_prompt_tokens
from hidream_grpc.model.checkpoint.sizes import ImageSize, SizeLimits
from hidream_grpc.model.checkpoint.step_shapes import StepShape
from hidream_grpc.model.checkpoint.text_encoders import TextEncoderName
from hidream_grpc.model.checkpoint.weights.vae import vae_tensors
from hidream_grpc.model.costs.activations import decode_bytes, prompts_bytes, step_bytes
from hidream_grpc.model.costs.ranks import RankPlace
from hidream_grpc.model.costs.steps import Sample, StepCosts, step_costs
from hidream_grpc.model.costs.weights import grouped_weights, text_encoder_tensors, transformer_bytes
from hidream_grpc.model.parallel.layout import Layout
from hidream_grpc.model.parallel.planner import ModelDivisions
from hidream_grpc.model.prompts.assignment import assign_to_ranks
from hidream_grpc.model.weight_format import WeightFormat, WeightFormats

_LEAST_SIZE = ImageSize(512, 512)
_LEAST_SIZE_ON_CPU = ImageSize(256, 256)


@dataclass(frozen=True, slots=True)
class Workload:
    """The steps by which layouts are judged.

    Attributes:
        image: the step of one image of the default size, with guidance where the model needs it.
        full: a step of such images that is as full as the settings allow.
        largest: the step that needs most memory: of the largest images, as full as the settings allow.
        least: the smallest step that a rank must have room for.
    """

    image: StepShape
    full: StepShape
    largest: StepShape
    least: StepShape

    @classmethod
    def new(
        cls,
        size: ImageSize,
        size_limits: SizeLimits,
        max_step_pixels: int,
        device_type: DeviceType,
        *,
        has_guidance: bool,
        max_prompt_tokens: int = TRAINED_PROMPT_TOKENS,
    ) -> Workload:
        """The steps of one model.

        Args:
            size: the default size of images.
            size_limits: the sizes that can be generated.
            max_step_pixels: width × height × samples that a step may hold; one image may exceed it.
            device_type: type of the ranks' devices.
            has_guidance: whether an image has two samples.
            max_prompt_tokens: most tokens of a prompt.
        """
        num_samples = 2 if has_guidance else 1

        def step(size: ImageSize, max_pixels: int, prompt_tokens: int = TRAINED_PROMPT_TOKENS) -> StepShape:
            num_images = max(1, max_pixels // (size.width * size.height * num_samples))
            return StepShape(size.width, size.height, num_images * num_samples, prompt_tokens)

        largest = size_limits.largest_square()
        least = _LEAST_SIZE_ON_CPU if device_type is CPU else _LEAST_SIZE
        return cls(
            image=step(size, 0),
            full=step(size, max_step_pixels),
            largest=step(largest, max_step_pixels, padded_prompt_tokens(max_prompt_tokens)),
            least=step(min(least, largest, key=lambda each: each.width), 0),
        )


@dataclass(frozen=True, slots=True)
class WorkBytes:
    """Memory of a rank beside its weights.

    Attributes:
        step_bytes: bytes of the tensors of a step.
        decode_bytes: bytes of the tensors of an image that is decoded between steps.
        prompts_bytes: bytes of the prompts that stay encoded.
        runtime_bytes: bytes for the workspaces of kernels, for the allocator, for a layer that is
            dequantized, and for the process on a CPU.
    """

    step_bytes: int
    decode_bytes: int
    prompts_bytes: int
    runtime_bytes: int

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return self.step_bytes + self.decode_bytes + self.prompts_bytes + self.runtime_bytes


@dataclass(frozen=True)
class ModelCosts:
    """What the ranks of any layout of one model need and do, on one type of device.

    Attributes:
        configs: the configurations of the checkpoint.
        device_type: type of the ranks' devices.
        formats: the formats of the weights.
    """

    configs: CheckpointConfigs
    device_type: DeviceType
    formats: WeightFormats = field(default_factory=WeightFormats)

    @property
    def divisions(self) -> ModelDivisions:
        """How the model can be divided."""
        transformer = self.configs.transformer
        return ModelDivisions(transformer.num_attention_heads, transformer.num_routed_experts)

    def weights_bytes(self, layout: Layout, rank: int = 0) -> int:
        """Bytes of the transformer's weights that a rank holds, and of the autoencoder; rank 0 holds most."""
        place, size = RankPlace.of(layout, rank), self.device_type.bytes_per_weight
        return transformer_bytes(self.configs.transformer, place, self.formats.transformer, size) + (
            WeightFormat.BFLOAT16.component_bytes(vae_tensors(self.configs.vae), size)
        )

    @cached_property
    def text_encoders_bytes(self) -> Mapping[TextEncoderName, int]:
        """Bytes of each text encoder on a device."""
        return self._text_encoders_bytes(self.formats.text_encoders, self.device_type)

    @cached_property
    def text_encoders_host_bytes(self) -> Mapping[TextEncoderName, int]:
        """Bytes of each text encoder on the host of an accelerator."""
        return self._text_encoders_bytes(WeightFormat.BFLOAT16, CPU)

    @cached_property
    def _exact_text_encoders_bytes(self) -> Mapping[TextEncoderName, int]:
        """Bytes of each text encoder that is not quantized, by which they are spread over the ranks."""
        return self._text_encoders_bytes(WeightFormat.BFLOAT16, self.device_type)

    def text_encoders_of(self, layout: Layout) -> list[dict[TextEncoderName, int]]:
        """The text encoders of each rank with their bytes on a device, the largest first."""
        exact = self._exact_text_encoders_bytes
        owners = assign_to_ranks(exact, layout.world_size)
        names = sorted(owners, key=lambda name: -exact[name])
        return [
            {name: self.text_encoders_bytes[name] for name in names if owners[name] == rank}
            for rank in range(layout.world_size)
        ]

    def step(self, layout: Layout, shape: StepShape) -> StepCosts:
        """The most that a step costs any rank: the first ranks have the largest shares."""
        size = self.device_type.bytes_per_weight
        return step_costs(self.configs.transformer, layout, 0, self._sample(shape), shape.num_samples, size)

    def step_seconds(self, layout: Layout, shape: StepShape, speed: DeviceSpeed) -> float:
        """The time of a step on devices of that speed, where nothing is sent while something is computed."""
        step = self.step(layout, shape)
        return step.flops / speed.flops_per_second + step.bytes_sent / speed.bytes_per_second

    def work_bytes(self, layout: Layout, shape: StepShape) -> WorkBytes:
        """The memory that a rank needs beside its weights while steps of this shape run."""
        transformer, size = self.configs.transformer, self.device_type.bytes_per_weight
        sample = self._sample(shape)
        return WorkBytes(
            step_bytes=step_bytes(transformer, RankPlace.of(layout, 0), sample, shape.num_samples, size),
            decode_bytes=decode_bytes(self.configs.vae, shape.width, shape.height, size),
            prompts_bytes=prompts_bytes(transformer, sample, size),
            runtime_bytes=self.device_type.runtime_bytes + self._dequantized_bytes(layout),
        )

    def _dequantized_bytes(self, layout: Layout) -> int:
        """What a product is computed with, which is a part of a matrix or experts, and the one before it."""
        if not self.formats.transformer.is_quantized:
            return 0
        num_weights = 2 * MAX_DEQUANTIZED_WEIGHTS
        if self.device_type is not CPU:
            # One kernel takes the matrices of all experts: the first two of each, and then the third.
            num_weights = max(num_weights, grouped_weights(self.configs.transformer, RankPlace.of(layout, 0)))
        return num_weights * self.device_type.bytes_per_weight

    def _sample(self, shape: StepShape) -> Sample:
        scale = 2 ** (len(self.configs.vae.block_out_channels) - 1)
        return Sample(
            height=shape.height // scale,
            width=shape.width // scale,
            num_t5_tokens=shape.prompt_tokens,
            num_llama_tokens=shape.prompt_tokens,
        )

    def _text_encoders_bytes(
        self, weights: WeightFormat, device_type: DeviceType
    ) -> dict[TextEncoderName, int]:
        return {
            name: weights.component_bytes(shapes, device_type.bytes_per_weight)
            for name, shapes in text_encoder_tensors(self.configs).items()
        }
