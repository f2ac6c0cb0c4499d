"""The four text encoders of a checkpoint, as its configurations describe them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from hidream_grpc.model.checkpoint.files import (
    MAX_SEQUENCE_LENGTH,
    MODEL_PATH_FLAG,
    ClipConfig,
    LlamaConfig,
    T5Config,
    llama_folder,
    llama_tokenizer_folder,
    read_json,
    token_limit,
)
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
        output_shape: shape of its output for one prompt: (P,) of a CLIP, (T, D) of T5, (L, T, D) of Llama,
            where T is the padded length in tokens and L the number of layers that are read.
    """

    folder: Path
    tokenizer_folder: Path
    shapes: Shapes
    output_shape: tuple[int, ...]

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
    return {
        TextEncoderName.CLIP_L: _clip_files(model_path, ""),
        TextEncoderName.CLIP_G: _clip_files(model_path, "_2"),
        TextEncoderName.T5: TextEncoderFiles(
            t5_folder,
            t5_tokenizer,
            t5_tensors(t5_config),
            (_num_tokens(t5_tokenizer), t5_config.d_model),
        ),
        TextEncoderName.LLAMA: TextEncoderFiles(
            llama,
            llama_tokenizer,
            llama_tensors(llama_config),
            (num_llama_layers, _num_tokens(llama_tokenizer), llama_config.hidden_size),
        ),
    }


def _clip_files(model_path: Path, number: str) -> TextEncoderFiles:
    folder = model_path / f"text_encoder{number}"
    config = read_json(folder / "config.json", ClipConfig, MODEL_PATH_FLAG)
    return TextEncoderFiles(
        folder,
        model_path / f"tokenizer{number}",
        clip_tensors(config),
        (config.projection_dim,),
    )


def _num_tokens(tokenizer_folder: Path) -> int:
    return min(MAX_SEQUENCE_LENGTH, token_limit(tokenizer_folder))
