"""Resumable training state on disk, and learning-rate schedules shared by the stages."""

from pathlib import Path
from typing import Any

import torch


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write a training state so that a reader never sees half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def load_state(path: Path) -> dict[str, Any] | None:
    """The training state at `path`, or None where training has not begun."""
    if not path.exists():
        return None
    state: dict[str, Any] = torch.load(path, weights_only=False)
    return state


def rate_factor(
    progress: float, warm_up: float = 0.03, decay_from: float = 0.3, floor: float = 0.02
) -> float:
    """Learning-rate factor at a share of the training done: warm-up, plateau, linear decay."""
    if progress < warm_up:
        return max(progress / warm_up, 0.02)
    if progress < decay_from:
        return 1.0
    return max(floor, (1.0 - progress) / (1.0 - decay_from))
