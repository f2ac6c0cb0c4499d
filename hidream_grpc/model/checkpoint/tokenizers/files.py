"""The files of a checkpoint's tokenizers, and a check that they are complete."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from hidream_grpc.model.checkpoint.files import (
    MODEL_PATH_FLAG,
    check_file,
    llama_flag,
    llama_tokenizer_folder,
    read_json,
)

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "spiece.model",
)
"""All files of a tokenizer that are read if they exist."""

_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def check_tokenizers(model_path: Path, extra_model_path: Path | None) -> None:
    """Check that the four tokenizers exist, and that their files can be read.

    Raises:
        ModelNotFoundError: a file is missing, or cannot be read.
    """
    for name in ("tokenizer", "tokenizer_2"):
        _check_tokenizer(model_path / name, MODEL_PATH_FLAG, ("vocab.json", "merges.txt"))
    _check_tokenizer(model_path / "tokenizer_3", MODEL_PATH_FLAG, ("spiece.model",))
    _check_tokenizer(llama_tokenizer_folder(model_path, extra_model_path), llama_flag(model_path), ())


def _check_tokenizer(folder: Path, flag: str, vocabulary: tuple[str, ...]) -> None:
    """Check one tokenizer, which is a tokenizer.json or else these files."""
    has_vocabulary = any(os.path.lexists(folder / name) for name in vocabulary)
    if os.path.lexists(folder / "tokenizer.json") or not has_vocabulary:
        vocabulary = ("tokenizer.json",)
    for name in TOKENIZER_FILES:
        path = folder / name
        if name in vocabulary or os.path.lexists(path):
            check_file(path, flag)
            if name in _SETTINGS:
                read_json(path, dict[str, Any], flag)
