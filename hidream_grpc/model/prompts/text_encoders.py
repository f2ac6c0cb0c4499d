"""The text encoders of this rank, which turn a prompt into the input of the caption projection.

Legend of shapes: T tokens (to which the encoder pads the prompt), L Llama layers that the transformer reads.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from transformers import (
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    LlamaModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    T5EncoderModel,
    T5Tokenizer,
)

from hidream_grpc.devices.device import Device, open_device
from hidream_grpc.devices.device_types import CPU
from hidream_grpc.errors import NonFiniteError
from hidream_grpc.model.checkpoint.files import MODEL_PATH_FLAG, llama_flag
from hidream_grpc.model.checkpoint.text_encoders import TextEncoderFiles, TextEncoderName, text_encoder_files
from hidream_grpc.model.loading import load_module, load_tokenizer, loading
from hidream_grpc.model.parallel.groups import Axis
from hidream_grpc.model.parameters import PaddedPrompt
from hidream_grpc.model.prompts.assignment import assign_to_ranks
from hidream_grpc.model.weight_format import WeightFormat

logger = logging.getLogger(__name__)

_GB = 1e9


@dataclass(frozen=True, slots=True)
class PromptEmbeds:
    """The outputs of the text encoders for one prompt, in the model's dtype, on its device.

    Attributes:
        pooled: (P,), the pooled embeddings of both CLIP encoders.
        t5: (T, D), the last states of T5.
        llama: (L, T, D), the states after the layers of Llama that the transformer reads.
    """

    pooled: Tensor
    t5: Tensor
    llama: Tensor

    @classmethod
    def from_outputs(cls, outputs: Mapping[TextEncoderName, Tensor]) -> PromptEmbeds:
        """Combine the outputs of the four encoders."""
        return cls(
            pooled=torch.cat((outputs[TextEncoderName.CLIP_L], outputs[TextEncoderName.CLIP_G])),
            t5=outputs[TextEncoderName.T5],
            llama=outputs[TextEncoderName.LLAMA],
        )


class TextEncoder(Protocol):
    """One encoder with its tokenizer."""

    def encode(self, prompt: PaddedPrompt) -> Tensor:
        """Encode one prompt into a tensor of `TextEncoderFiles.output_shape`."""


class TextEncoders:
    """The text encoders of a checkpoint, of which this rank runs its own.

    Attributes:
        owners: the rank of each encoder; the same on every rank.
        num_parameters: number of weights of all encoders on all ranks.

    Args:
        own: the encoders of this rank.
        files: the files of all encoders.
        owners: the rank of each encoder.
        device: device of the outputs, which also decides their dtype.
    """

    def __init__(
        self,
        own: Mapping[TextEncoderName, TextEncoder],
        files: Mapping[TextEncoderName, TextEncoderFiles],
        owners: Mapping[TextEncoderName, int],
        device: Device,
    ) -> None:
        self.owners = dict(owners)
        self._own = dict(own)
        self.num_parameters = sum(f.num_parameters for f in files.values())
        self._files = dict(files)
        self._device = device

    @classmethod
    def from_pretrained(
        cls,
        model_path: Path,
        extra_model_path: Path | None,
        llama_layers: tuple[int, ...],
        device: Device,
        world: Axis,
        weights: WeightFormat = WeightFormat.BFLOAT16,
        reserve_bytes: int = 0,
    ) -> TextEncoders:
        """Load this rank's encoders of a checkpoint, each onto the device where it has room.

        Call it when everything else of the model is loaded, since it measures the free memory.

        Args:
            model_path: the checkpoint.
            extra_model_path: the Llama folder, where the checkpoint holds none.
            llama_layers: layers of Llama whose states the transformer reads, each once.
            device: device of this rank.
            world: the ranks that share the encoders.
            weights: how to hold the encoders that are on the device. Those on the host of an accelerator have
                float32, in which it computes fastest.
            reserve_bytes: memory that stays free on the device, for steps, decoding and cached prompts.
        """
        files = text_encoder_files(model_path, extra_model_path, len(llama_layers))
        sizes_bytes = {name: f.num_parameters * device.dtype.itemsize for name, f in files.items()}
        owners = assign_to_ranks(sizes_bytes, world.size)
        # The largest first, since it gains most from the device.
        names = sorted(
            (name for name in files if owners[name] == world.index), key=sizes_bytes.__getitem__, reverse=True
        )
        own: dict[TextEncoderName, TextEncoder] = {}
        where: list[str] = []
        for name in names:
            size_bytes = weights.component_bytes(files[name].shapes, device.dtype.itemsize)
            encoder_device, reason = _choose_device(size_bytes, device, reserve_bytes)
            own_weights = weights if encoder_device is device else WeightFormat.BFLOAT16
            flag = llama_flag(model_path) if name is TextEncoderName.LLAMA else MODEL_PATH_FLAG
            with loading(files[name].folder, flag, device):
                own[name] = _load(name, files[name], llama_layers, encoder_device, own_weights)
            where.append(f"{name} {reason}")
        logger.info("text encoders of this rank: %s", "; ".join(where) or "none")
        return cls(own, files, owners, device)

    @torch.inference_mode()
    def encode(self, prompt: PaddedPrompt) -> dict[TextEncoderName, Tensor]:
        """Run this rank's encoders.

        Returns:
            The output of each encoder, in the model's dtype, on its device; for the encoders of other ranks
            an empty tensor that can receive it.

        Raises:
            NonFiniteError: an output holds NaN or infinity.

        Source: diffusers 0.42.1 pipeline_hidream_image.py, encode_prompt (padding and lengths).
        """
        device, dtype = self._device.torch_device, self._device.dtype
        outputs = {
            name: self._own[name].encode(prompt).to(device, dtype).contiguous()
            if name in self._own
            else torch.empty(files.output_shape(prompt.num_tokens), device=device, dtype=dtype)
            for name, files in self._files.items()
        }
        are_finite = {name: outputs[name].isfinite().all() for name in self._own}
        if broken := [name for name, is_finite in are_finite.items() if not is_finite]:
            raise NonFiniteError(f"what {' and '.join(broken)} gives for the prompt is not finite")
        return outputs

    def blank(self, prompt_tokens: int) -> dict[TextEncoderName, Tensor]:
        """Zeros in the shapes of the outputs for all prompts that are padded to so many tokens."""
        device, dtype = self._device.torch_device, self._device.dtype
        return {
            name: torch.zeros(files.output_shape(prompt_tokens), device=device, dtype=dtype)
            for name, files in self._files.items()
        }


class _ClipEncoder:
    def __init__(self, files: TextEncoderFiles, device: Device, weights: WeightFormat) -> None:
        self._tokenizer = load_tokenizer(CLIPTokenizer, files.tokenizer_folder)
        self._model = load_module(CLIPTextModelWithProjection, files.folder, device, weights)
        self._files = files

    def encode(self, prompt: PaddedPrompt) -> Tensor:
        """Return (P,), the pooled embedding."""
        tokens = _tokenize(self._tokenizer, prompt, self._files, self._model.device)
        pooled: Tensor = self._model(tokens["input_ids"])[0]
        return pooled[0]


class _T5Encoder:
    def __init__(self, files: TextEncoderFiles, device: Device, weights: WeightFormat) -> None:
        self._tokenizer = load_tokenizer(T5Tokenizer, files.tokenizer_folder)
        self._model = load_module(T5EncoderModel, files.folder, device, weights)
        self._files = files

    def encode(self, prompt: PaddedPrompt) -> Tensor:
        """Return (T, D), the last states."""
        tokens = _tokenize(self._tokenizer, prompt, self._files, self._model.device)
        states: Tensor = self._model(**tokens)[0]
        return states[0]


class _LlamaEncoder:
    """Llama without the head that turns states into words, hence LlamaModel and not LlamaForCausalLM."""

    def __init__(
        self, files: TextEncoderFiles, layers: tuple[int, ...], device: Device, weights: WeightFormat
    ) -> None:
        self._tokenizer = load_tokenizer(PreTrainedTokenizerFast, files.tokenizer_folder)
        # Llama has no padding token; the pipeline uses this one.
        self._tokenizer.pad_token = self._tokenizer.eos_token
        self._model = load_module(LlamaModel, files.folder, device, weights)
        self._layers = layers
        self._files = files

    def encode(self, prompt: PaddedPrompt) -> Tensor:
        """Return (L, T, D), the states after the layers that are read."""
        tokens = _tokenize(self._tokenizer, prompt, self._files, self._model.device)
        states = self._model(**tokens, output_hidden_states=True, use_cache=False).hidden_states
        # The first entry is the input of the first layer.
        return torch.cat([states[layer + 1] for layer in self._layers])


def _load(
    name: TextEncoderName,
    files: TextEncoderFiles,
    llama_layers: tuple[int, ...],
    device: Device,
    weights: WeightFormat,
) -> TextEncoder:
    match name:
        case TextEncoderName.CLIP_L | TextEncoderName.CLIP_G:
            return _ClipEncoder(files, device, weights)
        case TextEncoderName.T5:
            return _T5Encoder(files, device, weights)
        case TextEncoderName.LLAMA:
            return _LlamaEncoder(files, llama_layers, device, weights)


def _choose_device(size_bytes: int, device: Device, reserve_bytes: int) -> tuple[Device, str]:
    """Choose the device, if it has room beside the needs of denoising and decoding, or else the host's CPU.

    The host computes in the dtype of its CPU device, float32. In bfloat16, with half the memory, the same
    matrix product took 7 times as long on x86 without AVX-512 and 3.5 times without its bfloat16
    instructions, which few hosts of accelerators have (oneDNN in torch 2.13, ISA capped, 2026-11-25).

    Args:
        size_bytes: size of the encoder's weights on the device.
        device: device of this rank.
        reserve_bytes: memory that stays free on the device.

    Returns:
        The device of the encoder, and the reason, for the log.
    """
    if device.backend == CPU.backend:
        return device, f"on the CPU, {size_bytes / _GB:.3g} GB"
    # Memory that torch has cached counts as used.
    device.empty_cache()
    memory = device.memory()
    size, free, reserve = (
        f"{num_bytes / _GB:.3g} GB" for num_bytes in (size_bytes, memory.free_bytes, reserve_bytes)
    )
    if memory.free_bytes - size_bytes >= reserve_bytes:
        return device, f"on the device, {size} of {free} free"
    host = open_device(CPU.name, 0)
    reason = f"{size} do not fit into {free} free on the device, less {reserve} for denoising"
    return host, f"on the host's CPU in {host.dtype}, since {reason}"


def _tokenize(
    tokenizer: PreTrainedTokenizerBase, prompt: PaddedPrompt, files: TextEncoderFiles, device: torch.device
) -> dict[str, Tensor]:
    """Tokenize one prompt for an encoder, padded as far as that encoder takes it.

    Returns:
        input_ids and attention_mask, (1, T), int64, on the device.
    """
    tokens = tokenizer(
        [prompt.text],
        padding="max_length",
        max_length=files.num_tokens(prompt.num_tokens),
        truncation=True,
        return_tensors="pt",
    )
    return {name: tokens[name].to(device) for name in ("input_ids", "attention_mask")}
