"""The four text encoders of a checkpoint, as its configurations describe them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from hidream_grpc.model.checkpoint.files import (
    MODEL_PATH_FLAG,
    ClipConfig,
    LlamaConfig,
    T5Config,
    llama_flag,
    llama_folder,
    llama_tokenizer_folder,
    read_json,
    token_limit,
)
from hidream_grpc.model.checkpoint.prompt_lengths import MAX_PROMPT_TOKENS
from hidream_grpc.model.checkpoint.weights.text_encoders import clip_tensors, llama_tensors, t5_tensors
from hidream_grpc.model.checkpoint.weights.transformer import Shapes


class TextEncoderName(StrEnum):
    """Names of the text encoders, in the order in which ranks exchange their outputs."""

    CLIP_L = "CLIP-L"
    CLIP_G = "CLIP-G"
    T5 = "T5"
    LLAMA = "Llama"


@dataclass(frozen=True, slots=True)
class TextEncoderFiles:
    """One text encoder of a checkpoint.

    Attributes:
        folder: folder of its weights and configuration.
        tokenizer_folder: folder of its tokenizer.
        shapes: shapes of the tensors that are read, by name; its files may hold others.
        max_tokens: most tokens that it takes of a prompt, special tokens included.
        output_sides: (P,) of a CLIP, (None, D) of T5, (L, None, D) of Llama, where L is the number of layers
            that are read, and None stands for the padded length in tokens.
    """

    folder: Path
    tokenizer_folder: Path
    shapes: Shapes
    max_tokens: int
    output_sides: tuple[int | None, ...]

    def num_tokens(self, prompt_tokens: int) -> int:
        """Number of tokens to which it pads a prompt of this bucket."""
        return min(prompt_tokens, self.max_tokens)

    def output_shape(self, prompt_tokens: int) -> tuple[int, ...]:
        """Shape of its output for one prompt of this bucket."""
        num_tokens = self.num_tokens(prompt_tokens)
        return tuple(num_tokens if side is None else side for side in self.output_sides)

    @property
    def num_parameters(self) -> int:
        """Number of weights that are read."""
        return sum(map(math.prod, self.shapes.values()))


def text_encoder_files(
    model_path: Path, extra_model_path: Path | None, num_llama_layers: int
) -> dict[TextEncoderName, TextEncoderFiles]:
    """Describe the text encoders of a checkpoint that `describe_checkpoint` has accepted.

    Args:
        model_path: the checkpoint.
        extra_model_path: the Llama folder, where the checkpoint holds none.
        num_llama_layers: number of layers of Llama whose states are read.
    """
    t5_folder, t5_tokenizer = model_path / "text_encoder_3", model_path / "tokenizer_3"
    llama = llama_folder(model_path, extra_model_path)
    llama_tokenizer = llama_tokenizer_folder(model_path, extra_model_path)
    t5_config = read_json(t5_folder / "config.json", T5Config, MODEL_PATH_FLAG)
    llama_config = read_json(llama / "config.json", LlamaConfig, MODEL_PATH_FLAG)
    max_tokens = prompt_token_limits(model_path, extra_model_path)
    return {
        name: _clip_files(model_path, number, max_tokens[name])
        for name, number in ((TextEncoderName.CLIP_L, ""), (TextEncoderName.CLIP_G, "_2"))
    } | {
        TextEncoderName.T5: TextEncoderFiles(
            t5_folder,
            t5_tokenizer,
            t5_tensors(t5_config),
            max_tokens[TextEncoderName.T5],
            (None, t5_config.d_model),
        ),
        TextEncoderName.LLAMA: TextEncoderFiles(
            llama,
            llama_tokenizer,
            llama_tensors(llama_config),
            max_tokens[TextEncoderName.LLAMA],
            (num_llama_layers, None, llama_config.hidden_size),
        ),
    }


def prompt_token_limits(model_path: Path, extra_model_path: Path | None) -> dict[TextEncoderName, int]:
    """Most tokens of a prompt that each text encoder of a checkpoint takes, special tokens included.

    That of T5 and Llama is their tokenizer's own, at most `MAX_PROMPT_TOKENS`. Both CLIPs take what the one
    with fewer positions has room for: 218 in the released checkpoints, which the pipeline names outright.

    Args:
        model_path: the checkpoint.
        extra_model_path: the Llama folder, where the checkpoint holds none.

    Source: diffusers 0.42.1 pipeline_hidream_image.py, `_get_*_prompt_embeds`.
    """
    num_positions = min(
        read_json(model_path / name / "config.json", ClipConfig, MODEL_PATH_FLAG).max_position_embeddings
        for name in ("text_encoder", "text_encoder_2")
    )
    of_clip = min(MAX_PROMPT_TOKENS, num_positions)
    llama_tokenizer = llama_tokenizer_folder(model_path, extra_model_path)
    return {
        TextEncoderName.CLIP_L: of_clip,
        TextEncoderName.CLIP_G: of_clip,
        TextEncoderName.T5: token_limit(model_path / "tokenizer_3"),
        TextEncoderName.LLAMA: token_limit(llama_tokenizer, llama_flag(model_path)),
    }


def _clip_files(model_path: Path, number: str, max_tokens: int) -> TextEncoderFiles:
    folder = model_path / f"text_encoder{number}"
    config = read_json(folder / "config.json", ClipConfig, MODEL_PATH_FLAG)
    return TextEncoderFiles(
        folder,
        model_path / f"tokenizer{number}",
        clip_tensors(config),
        max_tokens,
        (config.projection_dim,),
    )
