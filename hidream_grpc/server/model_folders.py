"""Names of model folders that every library takes."""

from __future__ import annotations

import os
from pathlib import Path


def utf8_path(folder: Path) -> Path:
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
        # What is wrong with it is told with its own name.
        return folder
    return Path(f"/proc/{os.getpid()}/fd/{descriptor}")
