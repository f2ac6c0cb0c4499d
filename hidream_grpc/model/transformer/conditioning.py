"""What a prompt becomes, once, for all steps of all requests that have it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Conditioning:
    """A prompt as the transformer's blocks take it: model dtype, on the device, the same on every rank.

    Attributes:
        pooled: (D,), the embedding of CLIP's pooled output; a step adds its timestep's.
        t5: (T, D), projected states of T5.
        llama: (blocks, T, D), for each block the projected states of its layer of Llama.
    """

    pooled: Tensor
    t5: Tensor
    llama: Tensor
