"""Identifies a checkpoint by samples of its files, whatever its folder is called."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from hidream_grpc.errors import CheckpointChangedError, ModelNotFoundError
from hidream_grpc.model.checkpoint.files import (
    LLAMA_TOKENIZER,
    MODEL_PATH_FLAG,
    llama_flag,
    llama_tokenizer_folder,
)
from hidream_grpc.model.checkpoint.tokenizers.files import TOKENIZER_FILES
from hidream_grpc.model.checkpoint.weights.components import components
from hidream_grpc.model.checkpoint.weights.files import weight_files

_DIGITS = 16
_SAMPLE_BYTES = 4096
_MAX_SAMPLES = 16
"""Most samples of one weight file, so that a few megabytes of a checkpoint of 60 GB are read."""

_PIPELINE_FILES = ("model_index.json", "generation_config.json", "scheduler/scheduler_config.json")
_TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")


def fingerprint_of(model_path: Path, extra_model_path: Path | None) -> str:
    """Compute the fingerprint of a checkpoint from the files that are loaded, in milliseconds.

    It covers every configuration and tokenizer file, and of each weight file the size, the header and samples
    spread over its data. So it differs for retrained weights, while a few altered bytes may lie between two
    samples. The place and the dates of the files, and other files in the folders, make no difference.

    Args:
        model_path: a HiDream-I1 in diffusers format.
        extra_model_path: the Llama folder; used only where the checkpoint holds none.

    Returns:
        Hexadecimal digits.

    Raises:
        ModelNotFoundError: a configuration is missing, or a file cannot be read.
    """
    return _digest(_files(model_path, extra_model_path))


def tokenizer_fingerprint_of(model_path: Path, extra_model_path: Path | None) -> str:
    """Compute the fingerprint of a checkpoint's tokenizers: equal ones give every prompt the same tokens.

    Arguments, result and errors are those of `fingerprint_of`.
    """
    return _digest(_all_tokenizer_files(model_path, extra_model_path))


def _digest(files: Iterator[tuple[str, Path, str]]) -> str:
    digest = hashlib.sha256()
    for name, path, flag in files:
        size_bytes, parts = _read(path, flag)
        digest.update(f"{name}\n{size_bytes}\n".encode())
        for part in parts:
            digest.update(part)
    return digest.hexdigest()[:_DIGITS]


@contextmanager
def unchanged_checkpoint(model_path: Path, extra_model_path: Path | None, fingerprint: str) -> Iterator[None]:
    """Check that the checkpoint has this fingerprint before and after it is loaded inside the block.

    Raises:
        CheckpointChangedError: it has another one; also raised in place of the error of a load whose files
            were exchanged meanwhile.
        ModelNotFoundError: a file is missing or cannot be read.
    """
    _require(model_path, extra_model_path, fingerprint)
    try:
        yield
    finally:
        _require(model_path, extra_model_path, fingerprint)


def _require(model_path: Path, extra_model_path: Path | None, fingerprint: str) -> None:
    if fingerprint_of(model_path, extra_model_path) != fingerprint:
        raise CheckpointChangedError(model_path)


def _files(model_path: Path, extra_model_path: Path | None) -> Iterator[tuple[str, Path, str]]:
    """For each file that is loaded: its name within the checkpoint, its path, and the flag of its folder."""
    for name in _PIPELINE_FILES:
        if (model_path / name).is_file():
            yield name, model_path / name, MODEL_PATH_FLAG
    for part in components(model_path, extra_model_path):
        for path in (part.folder / "config.json", *weight_files(part.folder, part.library, part.flag)):
            yield f"{part.name}/{path.name}", path, part.flag
    yield from _all_tokenizer_files(model_path, extra_model_path)


def _all_tokenizer_files(model_path: Path, extra_model_path: Path | None) -> Iterator[tuple[str, Path, str]]:
    for tokenizer in _TOKENIZERS:
        yield from _tokenizer_files(tokenizer, model_path / tokenizer, MODEL_PATH_FLAG)
    llama = llama_tokenizer_folder(model_path, extra_model_path)
    yield from _tokenizer_files(LLAMA_TOKENIZER, llama, llama_flag(model_path))


def _tokenizer_files(name: str, folder: Path, flag: str) -> Iterator[tuple[str, Path, str]]:
    for file_name in TOKENIZER_FILES:
        if (folder / file_name).is_file():
            yield f"{name}/{file_name}", folder / file_name, flag


def _read(path: Path, flag: str) -> tuple[int, list[bytes]]:
    """The size of a file in bytes, and the part of its content that the fingerprint covers."""
    try:
        with path.open("rb") as file:
            size_bytes = file.seek(0, 2)
            file.seek(0)
            parts = _read_samples(file, size_bytes) if path.suffix == ".safetensors" else [file.read()]
    except (OSError, ValueError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else str(error)
        raise ModelNotFoundError(flag, path, reason) from None
    return size_bytes, parts


def _read_samples(file: BinaryIO, size_bytes: int) -> list[bytes]:
    """Read the header of a safetensors file, and samples of its data: first, last, and some between."""
    header_length = file.read(8)
    data_start = 8 + int.from_bytes(header_length, "little")
    if len(header_length) < 8 or data_start > size_bytes:
        raise ValueError("not a whole safetensors file")
    parts = [file.read(data_start - 8)]
    if size_bytes - data_start <= _MAX_SAMPLES * _SAMPLE_BYTES:
        return [*parts, file.read()]
    last_start = size_bytes - _SAMPLE_BYTES
    for index in range(_MAX_SAMPLES):
        file.seek(data_start + index * (last_start - data_start) // (_MAX_SAMPLES - 1))
        parts.append(file.read(_SAMPLE_BYTES))
    return parts
