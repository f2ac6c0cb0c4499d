"""Counts the tokens of a prompt, for each text encoder.

The pipeline cuts prompts that are too long for an encoder; this service refuses them, so it must count first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from hidream_grpc.errors import ModelNotFoundError
from hidream_grpc.model.checkpoint.files import (
    MODEL_PATH_FLAG,
    ClipConfig,
    LlamaConfig,
    T5Config,
    llama_flag,
    llama_folder,
    llama_tokenizer_folder,
    read_json,
)
from hidream_grpc.model.checkpoint.text_encoders import TextEncoderName
from hidream_grpc.model.checkpoint.tokenizers.t5 import t5_tokenizer


@dataclass(frozen=True, slots=True)
class TokenCount:
    """Number of tokens of one prompt for one text encoder, special tokens included."""

    encoder: str
    num_tokens: int


@dataclass(frozen=True, slots=True)
class PromptTokenCounter:
    """The tokenizers of a checkpoint, by encoder."""

    _tokenizers: Mapping[TextEncoderName, Tokenizer]

    @classmethod
    def from_checkpoint(cls, model_path: Path, extra_model_path: Path | None) -> PromptTokenCounter:
        """Load the four tokenizers of a checkpoint that `describe_checkpoint` has accepted.

        Raises:
            ModelNotFoundError: a tokenizer cannot be read, or has tokens that its text encoder does not have.
        """
        clip_l, clip_g, t5 = (model_path / name for name in ("tokenizer", "tokenizer_2", "tokenizer_3"))
        llama, flag = llama_tokenizer_folder(model_path, extra_model_path), llama_flag(model_path)
        tokenizers = (
            _clip_tokenizer(clip_l),
            _clip_tokenizer(clip_g),
            _t5_tokenizer(t5),
            _tokenizer(llama, flag),
        )
        flags = (MODEL_PATH_FLAG, MODEL_PATH_FLAG, MODEL_PATH_FLAG, flag)
        for tokenizer, folder, folder_flag, num_tokens in zip(
            tokenizers,
            (clip_l, clip_g, t5, llama),
            flags,
            _vocabulary_sizes(model_path, extra_model_path),
            strict=True,
        ):
            largest_id = max(tokenizer.get_vocab().values(), default=0)
            if largest_id >= num_tokens:
                reason = f"gives token ids up to {largest_id}, its text encoder has {num_tokens} tokens"
                raise ModelNotFoundError(folder_flag, folder, reason)
        return cls(dict(zip(TextEncoderName, tokenizers, strict=True)))

    def count(self, prompt: str) -> tuple[TokenCount, ...]:
        """Count a prompt's tokens for every text encoder, as the encoder would get them; in any thread."""
        return tuple(
            # `encode` alone would keep the interpreter from all other threads.
            TokenCount(encoder, len(tokenizer.encode_batch_fast([prompt])[0]))
            for encoder, tokenizer in self._tokenizers.items()
        )


def _vocabulary_sizes(model_path: Path, extra_model_path: Path | None) -> tuple[int, ...]:
    """Number of tokens for which each text encoder has an embedding."""
    clip_l, clip_g = (
        read_json(model_path / name / "config.json", ClipConfig, MODEL_PATH_FLAG)
        for name in ("text_encoder", "text_encoder_2")
    )
    t5 = read_json(model_path / "text_encoder_3" / "config.json", T5Config, MODEL_PATH_FLAG)
    llama_config = llama_folder(model_path, extra_model_path) / "config.json"
    llama = read_json(llama_config, LlamaConfig, llama_flag(model_path))
    return tuple(config.vocab_size for config in (clip_l, clip_g, t5, llama))


def _tokenizer(folder: Path, flag: str = MODEL_PATH_FLAG) -> Tokenizer:
    path = folder / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no narrower one
        raise ModelNotFoundError(flag, path, f"is no tokenizer: {error}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _t5_tokenizer(folder: Path) -> Tokenizer:
    has_own = (folder / "tokenizer.json").is_file()
    return _tokenizer(folder) if has_own else t5_tokenizer(folder, MODEL_PATH_FLAG)


def _clip_tokenizer(folder: Path) -> Tokenizer:
    """Make CLIP's byte-level BPE from vocab.json and merges.txt, which alone published checkpoints hold.

    Source: OpenAI's CLIP, simple_tokenizer.py; transformers builds the same in CLIPTokenizer.
    """
    if (folder / "tokenizer.json").is_file():
        return _tokenizer(folder)
    files, flag = (folder / "vocab.json", folder / "merges.txt"), MODEL_PATH_FLAG
    vocabulary = read_json(files[0], dict[str, int], flag)
    start, end = "<|startoftext|>", "<|endoftext|>"
    for token in (start, end):
        if token not in vocabulary:
            raise ModelNotFoundError(flag, files[0], f"has no token {token}")
    try:
        model = models.BPE.from_file(*map(str, files), unk_token=end, end_of_word_suffix="</w>")
    except Exception as error:  # the library raises no narrower one
        raise ModelNotFoundError(flag, files[1], f"are no merges: {error}") from None
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in (start, end)])
    tokenizer.post_processor = processors.RobertaProcessing(
        (end, vocabulary[end]), (start, vocabulary[start]), trim_offsets=False, add_prefix_space=False
    )
    return tokenizer
