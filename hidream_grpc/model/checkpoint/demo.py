"""The demo checkpoint that ships with the package."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

DEMO_NAME = "demo"


def demo_checkpoint_path() -> Path:
    """Folder of the demo checkpoint, which is a complete but very small HiDream-I1 in diffusers format."""
    return Path(str(resources.files("hidream_grpc"))) / "demo_checkpoint"
