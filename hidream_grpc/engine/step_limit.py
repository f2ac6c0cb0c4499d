"""How many pixels one step may hold: what the devices have room for, and what of each size pays. Pure."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from hidream_grpc.engine.step_budget import StepBudget
from hidream_grpc.model.parameters import SampleSize

logger = logging.getLogger(__name__)

MIN_WAIT_STEPS = 100
MAX_WAIT_STEPS = 6400
"""Steps that a lowered limit holds back before it rises, at first and at most."""
RETRY_FACTOR = 64
"""How many times as long it stays just below what did not fit, before that is tried again."""
MAX_SIZES = 256
"""Callers choose sizes: what was learnt of those that were seen longest ago is forgotten."""


@dataclass(frozen=True, slots=True)
class StepPixels(Mapping[SampleSize, int]):
    """What a step of each size may hold at one moment; of one that has not run, by the size most like it.

    Attributes:
        max_pixels: what one step of any size may hold.
        known: the budget in pixels of each size that has run.
        learnt: the budget in pixels of each of these that has proven the best.
    """

    max_pixels: int
    known: Mapping[SampleSize, int]
    learnt: Mapping[SampleSize, int]

    def __getitem__(self, size: SampleSize) -> int:
        pixels = self.known.get(size)
        if pixels is None:
            pixels = StepBudget(size.width * size.height, _learnt_of_nearest(self.learnt, size)).pixels
        return min(self.max_pixels, pixels)

    def __iter__(self) -> Iterator[SampleSize]:
        return iter(self.known)

    def __len__(self) -> int:
        return len(self.known)


class StepLimit:
    """The limit of one step, at most the configured one, and below it the budget of each size.

    After a lack of memory the limit is half of what did not fit. It rises by a quarter after every
    `MIN_WAIT_STEPS` steps that had to leave requests out for it and went well, until it is just below what
    did not fit. That itself is tried again after `RETRY_FACTOR` times as many. A lack of memory that is not
    the first one doubles these numbers, so that a limit which is right is tried ever more rarely.

    Args:
        max_pixels: as configured.
    """

    def __init__(self, max_pixels: int) -> None:
        self._max_pixels = max_pixels
        self._pixels = max_pixels
        self._wait_steps = MIN_WAIT_STEPS
        self._has_run_out = False
        # The least that did not fit; None while nothing is known not to.
        self._failed_pixels: int | None = None
        self._num_full_steps = 0
        self._budgets: OrderedDict[SampleSize, StepBudget] = OrderedDict()

    @property
    def pixels(self) -> int:
        """What one step of any size may hold now."""
        return self._pixels

    @property
    def by_size(self) -> Mapping[SampleSize, int]:
        """What a step of each size may hold now; less than `pixels` where more does not pay."""
        known = {size: budget.pixels for size, budget in self._budgets.items()}
        return StepPixels(self._pixels, known, self.learnt)

    @property
    def learnt(self) -> Mapping[SampleSize, int]:
        """The budget in pixels of each known size that has proven the best, as `begin` takes it."""
        return {size: budget.learnt_pixels for size, budget in self._budgets.items()}

    def begin(self, learnt: Mapping[SampleSize, int]) -> None:
        """Begin with what was learnt on these devices before, and forget what was learnt on others."""
        self._budgets.clear()
        for size, pixels in learnt.items():
            self._add(size, pixels)

    def know(self, sizes: Iterable[SampleSize]) -> None:
        """Have a budget for each of these sizes; a new one begins with that of the size most like it."""
        for size in sizes:
            if size not in self._budgets:
                self._add(size, _learnt_of_nearest(self.learnt, size))
            self._budgets.move_to_end(size)
        while len(self._budgets) > MAX_SIZES:
            self._budgets.popitem(last=False)

    def observe(
        self, size: SampleSize, step_pixels: int, round_seconds: float | None, *, is_full: bool
    ) -> bool:
        """Learn from a step that went well.

        Args:
            size: of its samples.
            step_pixels: width × height × samples that it held.
            round_seconds: duration of the round that held it; None where it held other work too.
            is_full: whether it left out requests for want of room.

        Returns:
            Whether another budget has proven the best for the size.
        """
        self.know((size,))
        budget = self._budgets[size]
        if is_full and budget.pixels >= self._pixels:
            self._note_full_step()
        if round_seconds is None:
            return False
        has_changed = budget.observe(step_pixels, round_seconds, self._pixels, is_full=is_full)
        if has_changed:
            logger.info("a step of %s may hold %d pixels", size, min(self._pixels, budget.pixels))
        return has_changed

    def run_out(self, step_pixels: int) -> None:
        """Record that a step of so many pixels did not fit the devices; 0 where that is not known."""
        if not step_pixels:
            return
        if self._has_run_out:
            self._wait_steps = min(2 * self._wait_steps, MAX_WAIT_STEPS)
        self._has_run_out = True
        self._failed_pixels = min(self._failed_pixels or step_pixels, step_pixels)
        self._num_full_steps = 0
        self._pixels = min(self._pixels, max(1, step_pixels // 2))
        logger.warning("a step may hold %d pixels from now on", self._pixels)

    def lift(self) -> None:
        """Go back to the configured limit: the ranks are new, and what did not fit may fit now."""
        self._failed_pixels = None
        self._raise_to(self._max_pixels)

    def forget(self) -> None:
        """Start anew, as if the memory had always been enough."""
        self._pixels = self._max_pixels
        self._num_full_steps = 0
        self._wait_steps = MIN_WAIT_STEPS
        self._has_run_out = False
        self._failed_pixels = None

    def _add(self, size: SampleSize, pixels: int) -> None:
        self._budgets[size] = StepBudget(size.width * size.height, pixels)

    def _note_full_step(self) -> None:
        """Count a step that would have held more without the limit."""
        if self._pixels == self._max_pixels:
            return
        self._num_full_steps += 1
        if self._failed_pixels is not None and self._pixels >= self._failed_pixels - 1:
            if self._num_full_steps >= RETRY_FACTOR * self._wait_steps:
                self._failed_pixels = None
        elif self._num_full_steps >= self._wait_steps:
            most = self._max_pixels if self._failed_pixels is None else self._failed_pixels - 1
            self._raise_to(min(self._max_pixels, most, self._pixels + max(1, self._pixels // 4)))

    def _raise_to(self, pixels: int) -> None:
        if pixels > self._pixels:
            logger.info("a step may hold %d pixels again", pixels)
        self._pixels = pixels
        self._num_full_steps = 0


def _learnt_of_nearest(learnt: Mapping[SampleSize, int], size: SampleSize) -> int:
    """The budget in pixels of the size most like another one; 0 where none is known."""

    def unlikeness(known: SampleSize) -> float:
        pixels, known_pixels = size.width * size.height, known.width * known.height
        return max(pixels, known_pixels) / min(pixels, known_pixels)

    nearest = min(learnt, key=unlikeness, default=None)
    return 0 if nearest is None else learnt[nearest]
