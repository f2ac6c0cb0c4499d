"""How many pixels one step may hold: less after a lack of memory, and more again later."""

from __future__ import annotations

import logging

logger = logging.getLogger(__name__)

MIN_WAIT_STEPS = 100
MAX_WAIT_STEPS = 6400
"""Steps that a lowered limit holds back before it rises, at first and at most."""


class StepLimit:
    """The limit of one step, at most the configured one.

    After a lack of memory it is half of what did not fit. It rises by a quarter after every `MIN_WAIT_STEPS`
    steps that had to leave requests out for it and went well. A lack of memory that is not the first one
    doubles that number, so that a limit which is right is tried ever more rarely.

    Args:
        max_pixels: as configured.
    """

    def __init__(self, max_pixels: int) -> None:
        self._max_pixels = max_pixels
        self._pixels = max_pixels
        self._wait_steps = MIN_WAIT_STEPS
        self._has_run_out = False
        self._num_full_steps = 0

    @property
    def pixels(self) -> int:
        """What one step may hold now."""
        return self._pixels

    def run_out(self, step_pixels: int) -> None:
        """Record that a step of so many pixels did not fit the devices; 0 where that is not known."""
        if not step_pixels:
            return
        if self._has_run_out:
            self._wait_steps = min(2 * self._wait_steps, MAX_WAIT_STEPS)
        self._has_run_out = True
        self._num_full_steps = 0
        self._pixels = min(self._pixels, max(1, step_pixels // 2))
        logger.warning("a step may hold %d pixels from now on", self._pixels)

    def note_full_step(self) -> None:
        """Record that a step went well that would have held more without the limit."""
        if self._pixels == self._max_pixels:
            return
        self._num_full_steps += 1
        if self._num_full_steps == self._wait_steps:
            self._raise_to(min(self._max_pixels, self._pixels + max(1, self._pixels // 4)))

    def lift(self) -> None:
        """Go back to the configured limit: the ranks are new, and what did not fit may fit now."""
        self._raise_to(self._max_pixels)

    def forget(self) -> None:
        """Start anew, as if the memory had always been enough."""
        self._pixels = self._max_pixels
        self._num_full_steps = 0
        self._wait_steps = MIN_WAIT_STEPS
        self._has_run_out = False

    def _raise_to(self, pixels: int) -> None:
        if pixels > self._pixels:
            logger.info("a step may hold %d pixels again", pixels)
        self._pixels = pixels
        self._num_full_steps = 0
