"""What the engine tells whoever counts. Frozen."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StepReport:
    """One denoising step of a batch.

    Attributes:
        step_seconds: duration on the slowest rank.
        width, height: of all requests in it, in pixels.
        num_samples: rows of the batch.
        snapshot_seconds: what handing up a snapshot after it cost; 0 without one.
        round_seconds: of the round that held it, from its planning to its report; None where prompts were
            read or images decoded beside it.
    """

    step_seconds: float
    width: int
    height: int
    num_samples: int
    snapshot_seconds: float = 0.0
    round_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class PromptReport:
    """How the prompts of requests that started came to be encoded.

    Attributes:
        num_cache_hits: prompts that were encoded already; the empty one, which always is, not counted.
        num_cache_misses: prompts for which the text encoders ran.
    """

    num_cache_hits: int
    num_cache_misses: int
