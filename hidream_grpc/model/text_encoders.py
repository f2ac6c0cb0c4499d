"""The four text encoders: a prompt becomes what the transformer is conditioned on.

Legend of shapes: T tokens (the padded length), L Llama layers that the transformer reads.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    LlamaModel,
    PreTrainedTokenizerFast,
    T5EncoderModel,
    T5Tokenizer,
)

from hidream_grpc.devices.base import Device
from hidream_grpc.model.checkpoint_files import MAX_SEQUENCE_LENGTH, llama_folder, llama_tokenizer_folder
from hidream_grpc.model.loading import load_module, load_tokenizer

# An entry of the real model takes 35 MB.
MAX_CACHED_PROMPTS = 16


@dataclass(frozen=True, slots=True)
class PromptEmbeds:
    """What the transformer is told of one prompt, in the model's dtype, on its device.

    Attributes:
        pooled: (P,), the pooled embeddings of both CLIP encoders.
        t5: (T, D), the last states of T5.
        llama: (L, T, D), states after those layers of Llama that the transformer reads.
    """

    pooled: Tensor
    t5: Tensor
    llama: Tensor


class TextEncoders:
    """CLIP-L, CLIP-G, T5 and Llama with their tokenizers, and the embeddings of the latest prompts.

    The embeddings of the empty prompt, which guidance needs all the time, always stay.
    """

    def __init__(
        self,
        clips: tuple[tuple[CLIPTokenizer, CLIPTextModelWithProjection], ...],
        t5: tuple[T5Tokenizer, T5EncoderModel],
        llama: tuple[PreTrainedTokenizerFast, LlamaModel],
        llama_layers: tuple[int, ...],
        device: Device,
    ) -> None:
        self._clips = clips
        self._t5_tokenizer, self._t5 = t5
        self._llama_tokenizer, self._llama = llama
        self._llama_layers = llama_layers
        self._device = device
        self._latest: OrderedDict[str, PromptEmbeds] = OrderedDict()
        self._empty = self._encode("")

    @classmethod
    def from_pretrained(
        cls, model_path: Path, extra_model_path: Path | None, llama_layers: tuple[int, ...], device: Device
    ) -> TextEncoders:
        """Load the encoders of a checkpoint onto a device.

        Args:
            model_path: the checkpoint.
            extra_model_path: the Llama folder, where the checkpoint holds none.
            llama_layers: layers whose states the transformer reads, each once.
            device: where they run.
        """

        llama_tokenizer = load_tokenizer(
            PreTrainedTokenizerFast, llama_tokenizer_folder(model_path, extra_model_path)
        )
        # Llama has no padding token; the pipeline takes this one.
        llama_tokenizer.pad_token = llama_tokenizer.eos_token
        return cls(
            clips=tuple(
                (
                    load_tokenizer(CLIPTokenizer, model_path / f"tokenizer{number}"),
                    load_module(CLIPTextModelWithProjection, model_path / f"text_encoder{number}", device),
                )
                for number in ("", "_2")
            ),
            t5=(
                load_tokenizer(T5Tokenizer, model_path / "tokenizer_3"),
                load_module(T5EncoderModel, model_path / "text_encoder_3", device),
            ),
            # LlamaModel is LlamaForCausalLM without the head that turns states into words.
            llama=(
                llama_tokenizer,
                load_module(LlamaModel, llama_folder(model_path, extra_model_path), device),
            ),
            llama_layers=llama_layers,
            device=device,
        )

    def modules(self) -> Iterator[nn.Module]:
        """Every encoder."""
        yield from (clip for _, clip in self._clips)
        yield self._t5
        yield self._llama

    def encode(self, prompt: str) -> PromptEmbeds:
        """Embeddings of one prompt; the encoders run only if it is not among the latest ones."""
        if prompt == "":
            return self._empty
        if prompt not in self._latest:
            self._latest[prompt] = self._encode(prompt)
        self._latest.move_to_end(prompt)
        if len(self._latest) > MAX_CACHED_PROMPTS:
            self._latest.popitem(last=False)
        return self._latest[prompt]

    @torch.inference_mode()
    def _encode(self, prompt: str) -> PromptEmbeds:
        """Run all four encoders.

        Source: diffusers 0.42.1 pipeline_hidream_image.py, encode_prompt (padding and lengths).
        """
        pooled = [clip(self._tokenize(tokenizer, prompt)["input_ids"])[0] for tokenizer, clip in self._clips]
        t5_input = self._tokenize(self._t5_tokenizer, prompt, self._t5_tokenizer.model_max_length)
        t5_states = self._t5(**t5_input)[0]
        llama_input = self._tokenize(self._llama_tokenizer, prompt, self._llama_tokenizer.model_max_length)
        # The first entry is the input of the first layer.
        llama_states = self._llama(**llama_input, output_hidden_states=True, use_cache=False).hidden_states[
            1:
        ]
        return PromptEmbeds(
            pooled=torch.cat(pooled, dim=-1)[0].to(self._device.dtype),
            t5=t5_states[0].to(self._device.dtype),
            llama=torch.cat([llama_states[layer] for layer in self._llama_layers]).to(self._device.dtype),
        )

    def _tokenize(
        self,
        tokenizer: CLIPTokenizer | T5Tokenizer | PreTrainedTokenizerFast,
        prompt: str,
        model_max_length: int = MAX_SEQUENCE_LENGTH,
    ) -> dict[str, Tensor]:
        """Tokens of one prompt, padded to the length that the transformer was trained with.

        Returns:
            input_ids and attention_mask, (1, T), int64, on the device.
        """
        tokens = tokenizer(
            [prompt],
            padding="max_length",
            max_length=min(MAX_SEQUENCE_LENGTH, model_max_length),
            truncation=True,
            return_tensors="pt",
        )
        return {name: tokens[name].to(self._device.torch_device) for name in ("input_ids", "attention_mask")}
