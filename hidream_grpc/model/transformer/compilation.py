"""Compiling the transformer's blocks at boot, for the steps that the operator named, and never again."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

import torch
from torch import nn

from hidream_grpc.devices import torch_private
from hidream_grpc.model.checkpoint.step_shapes import StepShape

logger = logging.getLogger(__name__)

# All blocks of a kind share their graphs: more than this for one function and shape is a defect.
_MAX_GRAPHS_PER_SHAPE = 8


def compile_blocks(
    blocks: Sequence[nn.Module], shapes: Sequence[StepShape], run_step: Callable[[StepShape], object]
) -> None:
    """Compile blocks for steps of some shapes; whatever else they get runs as if they were not compiled.

    Blocks of one kind share what is compiled. From here on this process compiles nothing, whoever asks.

    Args:
        blocks: of a transformer.
        shapes: of the steps, each once.
        run_step: runs the blocks as such a step does.

    Raises:
        Exception: the compiler's own, where it fails or is not there.
    """
    for block in blocks:
        block.compile(dynamic=False)
    for shape in shapes:
        started = time.monotonic()
        with torch_private.strict_compilation(_MAX_GRAPHS_PER_SHAPE * len(shapes)):
            run_step(shape)
        logger.info("compiled steps of %s in %.1f s", shape, time.monotonic() - started)
    torch.compiler.set_stance("eager_on_recompile")
