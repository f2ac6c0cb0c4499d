"""The folders of the model, under names that every library takes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from hidream_grpc.errors import ModelNotFoundError
from hidream_grpc.model.checkpoint.demo import demo_checkpoint_path
from hidream_grpc.model.checkpoint.files import EXTRA_MODEL_PATH_FLAG
from hidream_grpc.settings import Settings


@dataclass(frozen=True, slots=True)
class ModelFolders:
    """Where the model is read from.

    Attributes:
        model: a HiDream-I1 in diffusers format.
        extra_model: Llama-3.1-8B-Instruct, where the checkpoint holds none.
    """

    model: Path
    extra_model: Path | None


def model_folders(settings: Settings) -> ModelFolders:
    """The folders that the settings name, or that of the demo model.

    Raises:
        ModelNotFoundError: the extra one is not there, even where the checkpoint holds a Llama of its own.
    """
    model = settings.model_path
    extra_model = settings.extra_model_path
    folders = ModelFolders(
        demo_checkpoint_path() if model is None else _utf8_path(model),
        None if extra_model is None else _utf8_path(extra_model),
    )
    if folders.extra_model is not None and not folders.extra_model.is_dir():
        raise ModelNotFoundError(EXTRA_MODEL_PATH_FLAG, folders.extra_model)
    return folders


def _utf8_path(folder: Path) -> Path:
    """Another name of a folder whose own is not UTF-8, good in every process while this one lives.

    tokenizers 0.22 and safetensors 0.6, and so transformers and diffusers, take names in UTF-8 only.
    """
    try:
        str(folder).encode("utf-8")
        return folder
    except UnicodeEncodeError:
        pass
    try:
        descriptor = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        # The error that follows names the folder as it is.
        return folder
    return Path(f"/proc/{os.getpid()}/fd/{descriptor}")
