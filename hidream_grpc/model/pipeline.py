"""HiDream-I1 on one rank or many: encode, denoise step by step, decode.

A denoising step is `StepBatch.collect`, `predict`, `advance`. Every rank holds all states and all rows; the
ranks divide the work only in `predict`.

Legend of shapes: N images of a request, B rows of a batch (samples), C latent channels; H and W are
those of the latents, an eighth of the image's.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, SchedulerMixin
from torch import Tensor

from hidream_grpc.devices.device import Device
from hidream_grpc.errors import ModelNotFoundError, NonFiniteError
from hidream_grpc.model.checkpoint.files import MODEL_PATH_FLAG, TransformerConfig, read_json
from hidream_grpc.model.checkpoint.fingerprint import fingerprint_of, unchanged_checkpoint
from hidream_grpc.model.checkpoint.step_shapes import StepShape
from hidream_grpc.model.checkpoint.weights.files import Library, num_weights, read_tensors
from hidream_grpc.model.decoding.images import encode_image
from hidream_grpc.model.decoding.preview import LatentPreview
from hidream_grpc.model.decoding.vae import ImageDecoding
from hidream_grpc.model.denoising.schedulers import new_scheduler, scheduler_step
from hidream_grpc.model.denoising.snapshots import StateSnapshot
from hidream_grpc.model.denoising.state import DenoisingState, StepBatch
from hidream_grpc.model.loading import load_scheduler, load_vae, loading, quieten_libraries
from hidream_grpc.model.parallel.groups import ParallelGroups
from hidream_grpc.model.parallel.layout import Layout
from hidream_grpc.model.parallel.rows import divide_rows, gather_rows
from hidream_grpc.model.parameters import GenerationParameters, OutputFormat, PaddedPrompt
from hidream_grpc.model.prompts.encoding import EncodedPrompts, PromptEncoder
from hidream_grpc.model.prompts.text_encoders import TextEncoders
from hidream_grpc.model.snapshot_format import SnapshotIdentity
from hidream_grpc.model.transformer.compilation import compile_blocks
from hidream_grpc.model.transformer.model import HiDreamTransformer, RankRows
from hidream_grpc.model.weight_format import WeightFormats
from hidream_grpc.model.weights import load_share

_PREVIEW_QUALITY = 80


class HiDreamModel:
    """A loaded checkpoint. Do not call it from two threads at once.

    Attributes:
        scheduler_name: class of the checkpoint's scheduler in diffusers.
        shift: shift of the scheduler's timesteps.
        num_parameters: number of weights of all components.
        fingerprint: fingerprint of the checkpoint, see `fingerprint_of`.
    """

    def __init__(
        self,
        prompt_encoder: PromptEncoder,
        transformer: HiDreamTransformer,
        vae: AutoencoderKL,
        preview: LatentPreview,
        scheduler: SchedulerMixin,
        device: Device,
        groups: ParallelGroups,
        num_parameters: int,
        fingerprint: str,
    ) -> None:
        self.scheduler_name = type(scheduler).__name__
        self.shift = float(getattr(scheduler.config, "flow_shift", None) or scheduler.config.shift)
        self.num_parameters = num_parameters
        self.fingerprint = fingerprint
        self._prompt_encoder = prompt_encoder
        self._transformer = transformer
        self._vae = vae
        self._vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self._scheduler = scheduler
        self._device = device
        self._groups = groups
        self._preview = preview

    @classmethod
    def from_pretrained(
        cls,
        model_path: Path,
        extra_model_path: Path | None,
        device: Device,
        groups: ParallelGroups | None = None,
        fingerprint: str | None = None,
        weights: WeightFormats | None = None,
        reserve_bytes: int = 0,
    ) -> HiDreamModel:
        """Load a rank's share of a checkpoint that `describe_checkpoint` has accepted, from local files.

        Args:
            model_path: a HiDream-I1 in diffusers format.
            extra_model_path: the Llama folder, where the checkpoint holds none.
            device: device of this rank, which also decides the dtype.
            groups: the axes of this rank; None for one rank that has the whole model.
            fingerprint: fingerprint that the checkpoint must have; None for any.
            weights: formats in which the weights are held; None for the dtype of the device.
            reserve_bytes: memory of the device that stays free of text encoders, to work in.

        Raises:
            CheckpointChangedError: it is another checkpoint, or became one while it was read.
            ModelNotFoundError: a part cannot be loaded, or its autoencoder gives numbers that are not finite.
            Exception: the error of the device, as its runtime raised it.
        """
        quieten_libraries()
        groups = groups or ParallelGroups(Layout())
        if fingerprint is None:
            fingerprint = fingerprint_of(model_path, extra_model_path)
        with unchanged_checkpoint(model_path, extra_model_path, fingerprint):
            return cls._load(
                model_path,
                extra_model_path,
                device,
                groups,
                fingerprint,
                weights or WeightFormats(),
                reserve_bytes,
            )

    @classmethod
    def _load(
        cls,
        model_path: Path,
        extra_model_path: Path | None,
        device: Device,
        groups: ParallelGroups,
        fingerprint: str,
        weights: WeightFormats,
        reserve_bytes: int,
    ) -> HiDreamModel:
        config = read_json(model_path / "transformer" / "config.json", TransformerConfig, MODEL_PATH_FLAG)
        with loading(model_path / "transformer", MODEL_PATH_FLAG, device):
            with torch.device("meta"):
                transformer = HiDreamTransformer(config, groups, device)
            load_share(transformer, model_path / "transformer", device, weights.transformer)
        with loading(model_path / "vae", MODEL_PATH_FLAG, device):
            vae = load_vae(model_path / "vae", device)
            try:
                preview = LatentPreview.fit(vae)
            except NonFiniteError as error:
                raise ModelNotFoundError(MODEL_PATH_FLAG, model_path / "vae", str(error)) from None
        with loading(model_path / "scheduler", MODEL_PATH_FLAG, device):
            scheduler = load_scheduler(model_path / "scheduler")
            # Settings that do not fit together raise an error when the scheduler is first used.
            new_scheduler(scheduler, 2, config.max_tokens)
        # The text encoders come last: they go where the other parts leave room.
        text_encoders = TextEncoders.from_pretrained(
            model_path,
            extra_model_path,
            tuple(sorted(set(config.llama_layers))),
            device,
            groups.world,
            weights.text_encoders,
            reserve_bytes,
        )
        return cls(
            prompt_encoder=PromptEncoder(text_encoders, transformer, groups.world, device),
            transformer=transformer,
            vae=vae,
            preview=preview,
            scheduler=scheduler,
            device=device,
            groups=groups,
            num_parameters=text_encoders.num_parameters
            + sum(
                num_weights(read_tensors(model_path / component, Library.DIFFUSERS))
                for component in ("transformer", "vae")
            ),
            fingerprint=fingerprint,
        )

    @torch.inference_mode()
    def compile(self, shapes: Sequence[StepShape]) -> None:
        """Compile the transformer's blocks for steps of these shapes; steps of other shapes run uncompiled.

        Call it before the rank joins a group, which it does not need, and at most once in a process, in
        which nothing is compiled thereafter.

        Args:
            shapes: shapes of whole steps; each rank compiles for its own rows of them.

        Raises:
            Exception: the error of the compiler, where it fails or is missing.
        """
        with self._groups.without_collectives():
            compile_blocks(
                [*self._transformer.double_blocks, *self._transformer.single_blocks],
                shapes,
                lambda shape: self.predict(self._blank_batch(shape)),
            )

    def encode(self, prompts: Sequence[PaddedPrompt]) -> EncodedPrompts:
        """Encode prompts that are not cached; see `PromptEncoder.encode`."""
        return self._prompt_encoder.encode(prompts)

    @torch.inference_mode()
    def begin(
        self, parameters: GenerationParameters, encoded: EncodedPrompts | None = None
    ) -> DenoisingState:
        """Start a request: generate its first latents.

        Image i is generated from seed + i, whatever else is in the request. (torch's generator on a CPU
        uses the lower 32 bits of a seed.)

        Args:
            parameters: parameters of the request; images have exactly its size.
            encoded: encoded prompts, its own among them; None to encode them here.

        Raises:
            ValueError: width or height is not a multiple of a token's side.
            Exception: a prompt could not be encoded.
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
        shape = self._latents_shape(parameters.width, parameters.height)
        latents = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
        conditionings = (encoded or self.encode(parameters.prompts)).require(parameters.prompts)
        scheduler = new_scheduler(
            self._scheduler, parameters.num_inference_steps, self._transformer.config.max_tokens
        )
        return DenoisingState(
            parameters=parameters,
            latents=latents.to(self._device.torch_device, self._device.dtype),
            scheduler=scheduler,
            generators=generators,
            timestep_embeds=self._transformer.embed_timesteps(
                scheduler.timesteps.float().to(self._device.torch_device)
            ),
            conditioning=conditionings[0],
            negative_conditioning=conditionings[1] if parameters.uses_guidance else None,
        )

    @torch.inference_mode()
    def restore(
        self, parameters: GenerationParameters, snapshot: bytes, encoded: EncodedPrompts | None = None
    ) -> DenoisingState:
        """Start a request from a snapshot of it, taken on this layout or another one.

        Args:
            parameters: parameters of the request.
            snapshot: bytes that `pack_snapshot` returned; the following steps give what they would have given
                there, bit for bit where the layout is the same.
            encoded: encoded prompts, its own among them; None to encode them here.

        Raises:
            SnapshotError: the bytes are no snapshot of this request.
            Exception: a prompt could not be encoded.
        """
        state = self.begin(parameters, encoded)
        identity = SnapshotIdentity(parameters, self.fingerprint)
        StateSnapshot.from_bytes(snapshot, identity, self._device.torch_device).put_into(state)
        return state

    def pack_snapshot(self, snapshot: StateSnapshot, parameters: GenerationParameters) -> bytes:
        """Pack a snapshot of a request into bytes, which `restore` reads; wait for the device."""
        return snapshot.to_bytes(SnapshotIdentity(parameters, self.fingerprint))

    @torch.inference_mode()
    def predict(self, batch: StepBatch) -> Tensor:
        """Predict the noise in all rows of a batch; each rank computes its share of them.

        Rows may stand at different steps; each gives what it would give alone.

        Returns:
            (B, C, H, W), model dtype, the same on every rank.

        Raises:
            CollectiveError: a rank is gone.

        Source: diffusers 0.42.1 pipeline_hidream_image.py, the loop of `__call__` (its sign change of
            the output is done here).
        """
        rows = divide_rows(batch.num_samples, self._groups)
        latents = batch.latents[list(rows.own)]
        if rows.own:
            latents = self._transformer(
                RankRows(
                    latents=latents,
                    time_and_prompt=batch.time_and_prompt[list(rows.model)],
                    conditioning=tuple(batch.conditioning[row] for row in rows.own),
                    unpadded_samples=rows.unpadded_samples,
                )
            )
        return -gather_rows(latents[: rows.num_unpadded], batch.num_samples, self._groups)

    @torch.inference_mode()
    def advance(self, states: Sequence[DenoisingState], batch: StepBatch, noise_prediction: Tensor) -> None:
        """Advance every request of a batch by one denoising step.

        Args:
            states: the states that the batch was collected from, in the same order.
            batch: the batch of this step.
            noise_prediction: (B, C, H, W), the predictions of all rows.

        Raises:
            ValueError: the prediction does not have the rows of this batch.
        """
        predictions = batch.by_request(states, noise_prediction)
        for state, (unconditional, prediction) in zip(states, predictions, strict=True):
            if unconditional is not None:
                guidance_scale = state.parameters.guidance_scale
                prediction = unconditional + guidance_scale * (prediction - unconditional)
            state.latents = scheduler_step(
                state.scheduler, prediction, state.timestep, state.latents, state.generators
            )
            state.step += 1

    @torch.inference_mode()
    def start_decoding(self, state: DenoisingState, image_index: int) -> ImageDecoding:
        """Begin to turn the latents of one image into pixels.

        Args:
            state: state of a request, fully denoised or not; later steps do not change this image.
            image_index: 0 to num_images - 1.

        Raises:
            IndexError: the request has no such image.
        """
        return ImageDecoding(self._vae, state.latents[image_index].unsqueeze(0))

    def preview(self, state: DenoisingState) -> bytes:
        """Make a small JPEG of the current latents of image 0."""
        return encode_image(self._preview.render(state.latents[0]), OutputFormat.JPEG, _PREVIEW_QUALITY)

    def _blank_batch(self, shape: StepShape) -> StepBatch:
        """A batch of this shape whose latents and prompts are zeros; all ranks of a model must call it."""
        conditioning = self._prompt_encoder.blank(shape.prompt_tokens)
        device, dtype = self._device.torch_device, self._device.dtype
        latents_shape = self._latents_shape(shape.width, shape.height)
        return StepBatch(
            latents=torch.zeros(shape.num_samples, *latents_shape, device=device, dtype=dtype),
            time_and_prompt=conditioning.pooled.repeat(shape.num_samples, 1),
            conditioning=(conditioning,) * shape.num_samples,
        )

    def _latents_shape(self, width: int, height: int) -> tuple[int, int, int]:
        """Shape (C, H, W) of an image's latents."""
        return (
            self._transformer.config.in_channels,
            height // self._vae_scale_factor,
            width // self._vae_scale_factor,
        )
