"""How much of one size is worth a step, learnt from what steps took. Pure: no clock, no process, no torch.

A longer step makes every other request wait longer, so it must pay: a step of twice the pixels is worth it
while it takes at least `MIN_GAIN` less time for each pixel. What that saves depends on the device, the layout
and the size, so it is measured, and measured again ever more rarely.
"""

from __future__ import annotations

from collections import defaultdict, deque
from functools import partial
from statistics import median

MIN_GAIN = 1 / 32
"""Share of the time for a pixel that steps of twice the pixels must save."""
NUM_MEASURED = 12
"""Steps by which one budget is judged; their median leaves out the first one, which may compile."""
MIN_HOLD_STEPS = 100
MAX_HOLD_STEPS = 6400
"""Steps that a budget holds back requests before another one is tried, at first and at most."""
LEAST_PIXELS = 1024 * 1024
"""The least budget: one sample of the size that the model was trained on, for which all wait anyway."""


class StepBudget:
    """The budget of the steps of one size: the least one times a power of two, its level.

    From one level the next higher or lower one is tried for `NUM_MEASURED` steps, and kept where it is the
    better one; then the next one beyond it is tried at once. A trial that fails, or that
    `MIN_HOLD_STEPS` steps do not fill, is followed by one on the other side, after twice as many steps as the
    one before it. Only steps that the budget holds back are counted: where all requests fit, there is nothing
    to choose.

    Args:
        image_pixels: width × height of the size; one sample is never too much.
        pixels: the budget to begin with.
    """

    def __init__(self, image_pixels: int, pixels: int = 0) -> None:
        self._least_pixels = max(LEAST_PIXELS, image_pixels)
        self._level = self._level_of(pixels)
        self._trial: int | None = None
        self._direction = 1
        self._num_steps = 0
        # Of a trial: full ones that hold less than it allows.
        self._num_unfilled_steps = 0
        self._hold_steps = NUM_MEASURED
        # Seconds for a pixel of the latest steps of each level.
        self._rates: defaultdict[int, deque[float]] = defaultdict(partial(deque[float], maxlen=NUM_MEASURED))

    @property
    def pixels(self) -> int:
        """What a step may hold now."""
        return self._least_pixels << (self._level if self._trial is None else self._trial)

    @property
    def learnt_pixels(self) -> int:
        """The budget that has proven the best so far, whatever is tried now."""
        return self._least_pixels << self._level

    def observe(self, step_pixels: int, seconds: float, max_pixels: int, *, is_full: bool) -> bool:
        """Learn from a step.

        Args:
            step_pixels: width × height × samples that it held.
            seconds: what it took, from its planning to its report.
            max_pixels: what a step of any size may hold; budgets above it are not tried.
            is_full: whether it left out requests for want of room.

        Returns:
            Whether another budget has proven the best.
        """
        level, top_level = self._level_of(step_pixels), self._level_of(max_pixels)
        self._rates[level].append(seconds / step_pixels)
        before = self._level
        if max(self._level, self._trial or 0) > top_level:
            self._trial = None
            self._move_to(min(self._level, top_level))
        if self._trial is None:
            if is_full and self._level < level <= top_level:
                # One request alone: that it has company up to the next level costs nothing.
                self._move_to(level)
            elif is_full and level == self._level:
                self._count(top_level)
        elif level == self._trial and (is_full or self._trial > self._level):
            self._count(top_level)
        elif self._level <= level < self._trial and is_full:
            self._num_unfilled_steps += 1
            if self._num_unfilled_steps >= MIN_HOLD_STEPS:
                # What waits does not fill it.
                self._end_trial(is_better=False)
        elif self._trial < self._level <= level:
            # Each request alone is larger than what is tried.
            self._end_trial(is_better=False)
        return self._level != before

    def _count(self, top_level: int) -> None:
        self._num_steps += 1
        if self._trial is None:
            if self._num_steps >= self._hold_steps:
                self._try_neighbour(top_level)
        elif self._num_steps >= NUM_MEASURED:
            lower, higher = sorted((self._level, self._trial))
            pays = median(self._rates[higher]) <= (1 - MIN_GAIN) * median(self._rates[lower])
            is_better = pays == (self._trial == higher)
            self._end_trial(is_better=is_better)
            if is_better:
                self._try_neighbour(top_level)

    def _try_neighbour(self, top_level: int) -> None:
        self._num_steps = 0
        self._num_unfilled_steps = 0
        for direction in (self._direction, -self._direction):
            level = self._level + direction
            if 0 <= level <= top_level:
                self._direction = direction
                self._trial = level
                self._rates[level].clear()
                return

    def _end_trial(self, *, is_better: bool) -> None:
        if is_better and self._trial is not None:
            self._move_to(self._trial)
        else:
            self._direction = -self._direction
            self._hold_steps = max(MIN_HOLD_STEPS, min(2 * self._hold_steps, MAX_HOLD_STEPS))
        self._trial = None
        self._num_steps = 0

    def _move_to(self, level: int) -> None:
        self._level = level
        self._num_steps = 0
        self._hold_steps = NUM_MEASURED

    def _level_of(self, pixels: int) -> int:
        """The lowest level whose budget holds so many pixels."""
        return max(0, -(-pixels // self._least_pixels) - 1).bit_length()
