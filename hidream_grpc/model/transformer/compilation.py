"""Compiles the transformer's blocks at boot, for the steps that the operator named, and never later."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

import torch
from torch import nn

from hidream_grpc.devices import torch_private
from hidream_grpc.model.checkpoint.step_shapes import StepShape

logger = logging.getLogger(__name__)

# All blocks of a kind share their graphs; more graphs for one function and shape are a defect.
_MAX_GRAPHS_PER_SHAPE = 8


def compile_blocks(
    blocks: Sequence[nn.Module], shapes: Sequence[StepShape], run_step: Callable[[StepShape], object]
) -> None:
    """Compile blocks for steps of some shapes; steps of other shapes run uncompiled.

    Blocks of one kind share their graphs. Afterwards this process compiles nothing any more.

    Args:
        blocks: blocks of a transformer.
        shapes: shapes of the steps, each once.
        run_step: runs the blocks as a step of such a shape does.

    Raises:
        Exception: the error of the compiler, where it fails or is missing.
    """
    for block in blocks:
        block.compile(dynamic=False)
    for shape in shapes:
        started = time.monotonic()
        with torch_private.strict_compilation(_MAX_GRAPHS_PER_SHAPE * len(shapes)):
            run_step(shape)
        logger.info("compiled steps of %s in %.1f s", shape, time.monotonic() - started)
    torch.compiler.set_stance("eager_on_recompile")
