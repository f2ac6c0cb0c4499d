"""Refuses HiDream-E1, which edits images and generates none; its transformer is built like HiDream-I1's."""

from __future__ import annotations

import math
from pathlib import Path

from hidream_grpc.errors import ModelNotFoundError
from hidream_grpc.model.checkpoint.files import MODEL_PATH_FLAG, TransformerConfig
from hidream_grpc.model.checkpoint.hub import repository_name
from hidream_grpc.model.checkpoint.weights.files import Library, weight_files

_EDITING_MODEL = "HiDream-E1"


def check_no_editing_model(transformer_folder: Path, config: TransformerConfig) -> None:
    """Check that a transformer is not that of HiDream-E1, as far as its files show.

    Its tensors have the names and shapes of HiDream-I1's. Only the recorded origin differs, and the room for
    a source image beside the generated one.

    Raises:
        ModelNotFoundError: the transformer is that of HiDream-E1.
    """
    name = config.name_or_path or ""
    if _EDITING_MODEL in name:
        _refuse(transformer_folder / "config.json", f"comes from {name}")
    num_beside = config.max_tokens // 2
    if config.max_tokens == 2 * math.isqrt(num_beside) ** 2:
        _refuse(transformer_folder / "config.json", "max_resolution has room for two images side by side")
    for path in weight_files(transformer_folder, Library.DIFFUSERS):
        if _EDITING_MODEL in (repository := repository_name(path) or ""):
            _refuse(path, f"is a file of {repository}")


def _refuse(path: Path, reason: str) -> None:
    raise ModelNotFoundError(MODEL_PATH_FLAG, path, f"{reason}: {_EDITING_MODEL} edits, HiDream-I1 is needed")
