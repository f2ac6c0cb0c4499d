"""The components of a checkpoint that hold weights, with their folders and libraries."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hidream_grpc.model.checkpoint.files import LLAMA, MODEL_PATH_FLAG, llama_flag, llama_folder
from hidream_grpc.model.checkpoint.weights.files import Library

_LIBRARIES = {
    "transformer": Library.DIFFUSERS,
    "vae": Library.DIFFUSERS,
    "text_encoder": Library.TRANSFORMERS,
    "text_encoder_2": Library.TRANSFORMERS,
    "text_encoder_3": Library.TRANSFORMERS,
}


@dataclass(frozen=True, slots=True)
class Component:
    """One component of a checkpoint.

    Attributes:
        name: its name in model_index.json.
        folder: folder of its configuration and weights.
        library: library of its class.
        flag: flag that named the folder.
    """

    name: str
    folder: Path
    library: Library
    flag: str


def components(model_path: Path, extra_model_path: Path | None) -> tuple[Component, ...]:
    """List the components of a checkpoint, with Llama, which may have a folder of its own, last."""
    llama = llama_folder(model_path, extra_model_path)
    return (
        *(
            Component(name, model_path / name, library, MODEL_PATH_FLAG)
            for name, library in _LIBRARIES.items()
        ),
        Component(LLAMA, llama, Library.TRANSFORMERS, llama_flag(model_path)),
    )
