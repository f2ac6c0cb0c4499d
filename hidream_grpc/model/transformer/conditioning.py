"""The encoded form of a prompt, made once for all steps of all requests with that prompt."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Conditioning:
    """A prompt as input of the transformer's blocks: model dtype, on the device, the same on every rank.

    Attributes:
        pooled: (D,), the embedding of CLIP's pooled output, to which a step adds that of its timestep.
        t5: (T, D), projected states of T5.
        llama: (blocks, T, D), for each block the projected states of its layer of Llama.
    """

    pooled: Tensor
    t5: Tensor
    llama: Tensor

    @property
    def num_tokens(self) -> tuple[int, int]:
        """Numbers of tokens of T5 and of Llama, which are the same in all rows of one forward."""
        return self.t5.shape[0], self.llama.shape[1]
