"""How long the parts of a job take, as measured while jobs run. Pure: no clock; what is old is forgotten."""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from statistics import fmean, linear_regression
from typing import Generic, TypeVar

from hidream_grpc.engine.requests import StepReport
from hidream_grpc.model.checkpoint.prompt_lengths import TRAINED_PROMPT_TOKENS

NUM_KEPT = 16
"""Number of newest durations of each kind that count: a change of the load shows within as many steps."""
MAX_AGE_SECONDS = 300.0
"""What is older gives way to the first new measurement of its size, and nothing is refused by it."""
MIN_RECENT_STEPS = 4
"""Steps of a shape within that age by which requests may be refused: the first of them may compile."""
MAX_SHAPES = 256
"""Callers choose sizes: what was seen longest ago is forgotten."""

MIN_SECONDS = 1e-6
"""Nothing takes less, whatever the clock says."""

StepKind = tuple[int, int, int, int]
"""What the time of a step depends on: width and height in pixels, samples, and tokens of a prompt."""
Size = tuple[int, int]

Key = TypeVar("Key")


class _Recent:
    """The newest values of one kind."""

    def __init__(self) -> None:
        # When each was measured, and what.
        self._values: deque[tuple[float, float]] = deque(maxlen=NUM_KEPT)

    def add(self, seconds: float, now: float) -> None:
        """Add the newest one; those that are old by now are forgotten."""
        while self._values and self._values[0][0] < now - MAX_AGE_SECONDS:
            self._values.popleft()
        self._values.append((now, seconds))

    def num_since(self, time: float) -> int:
        """Count those that were measured since then."""
        return sum(measured >= time for measured, _ in self._values)

    @property
    def mean_seconds(self) -> float:
        """The interquartile mean: a first step that compiles, or a moment of a busy host, is left out.

        0 while there is none.
        """
        if not self._values:
            return 0.0
        cut = len(self._values) // 4
        return fmean(sorted(seconds for _, seconds in self._values)[cut : len(self._values) - cut])


class _Scaled(Generic[Key]):
    """Means by shape; a shape that was not measured follows from those next to it in work."""

    def __init__(self) -> None:
        self._measured: OrderedDict[Key, tuple[int, _Recent]] = OrderedDict()
        self._known: dict[Key, float] = {}
        self._points: list[tuple[int, float]] = []

    def add(self, key: Key, work: int, seconds: float, now: float) -> None:
        _, recent = self._measured.setdefault(key, (work, _Recent()))
        recent.add(max(seconds, MIN_SECONDS), now)
        self._measured.move_to_end(key)
        if len(self._measured) > MAX_SHAPES:
            self._measured.popitem(last=False)
        self._known.clear()

    def num_since(self, is_wanted: Callable[[Key], bool], time: float) -> dict[Key, int]:
        """Count what was measured since then of each such shape that was ever measured."""
        return {key: recent.num_since(time) for key, (_, recent) in self._measured.items() if is_wanted(key)}

    def forget(self, keys: Iterable[Key]) -> None:
        """Forget what was measured of these shapes."""
        for key in keys:
            del self._measured[key]
        self._known.clear()

    def get(self, key: Key, work: int) -> float:
        """Seconds for a shape; 0 while nothing is measured."""
        if (seconds := self._known.get(key)) is not None:
            return seconds
        if not self._known:
            self._known = {key: recent.mean_seconds for key, (_, recent) in self._measured.items()}
            self._points = sorted((work, self._known[key]) for key, (work, _) in self._measured.items())
        if key not in self._known and self._points:
            self._known[key] = _scale(self._points, work)
        return self._known.get(key, 0.0)


def _scale(points: list[tuple[int, float]], work: int) -> float:
    """On the line between the neighbours; beyond the first or last as steep as all points together are."""
    above = bisect_left(points, (work, 0.0))
    if 0 < above < len(points):
        (low, low_seconds), (high, high_seconds) = points[above - 1], points[above]
        return low_seconds + (high_seconds - low_seconds) * (work - low) / (high - low)
    known_work, seconds = points[min(above, len(points) - 1)]
    # In proportion to the work at most, and never less for more.
    slope = seconds / known_work
    if points[0][0] < points[-1][0]:
        slope = min(slope, max(0.0, linear_regression(*zip(*points, strict=True)).slope))
    return seconds + slope * (work - known_work)


class MeasuredDurations:
    """The times of steps, prompts and images since the start of the server, or of another layout.

    `now` is in seconds from any start, and never goes back.

    Attributes:
        has_steps: whether a step was measured, without which nothing can be estimated.
    """

    def __init__(self) -> None:
        self._steps: _Scaled[StepKind] = _Scaled()
        self._images: _Scaled[Size] = _Scaled()
        self._between_steps = _Recent()
        self._prompts = _Recent()
        self.has_steps = False

    def note_step(self, report: StepReport, now: float = 0.0) -> None:
        """Learn from a denoising step."""
        self.has_steps = True
        kind = (report.width, report.height, report.num_samples, report.prompt_tokens)
        work = report.width * report.height * report.num_samples
        self._steps.add(kind, work, report.step_seconds, now)
        of_size = self._steps.num_since(lambda kind: kind[:2] == report.size[:2], now - MAX_AGE_SECONDS)
        self._steps.forget([kind for kind, num_recent in of_size.items() if num_recent == 0])
        if report.round_seconds is not None:
            self._between_steps.add(max(0.0, report.round_seconds - report.step_seconds), now)

    def note_prompts(self, encode_seconds: float, now: float = 0.0) -> None:
        """Learn from the prompts of requests that started together."""
        self._prompts.add(encode_seconds, now)

    def note_image(self, width: int, height: int, decode_seconds: float, now: float = 0.0) -> None:
        """Learn from an image that was decoded."""
        self._images.add((width, height), width * height, decode_seconds, now)

    def step_seconds(
        self, width: int, height: int, num_samples: int, prompt_tokens: int = TRAINED_PROMPT_TOKENS
    ) -> float:
        """One step of so many samples of a size; 0 while no step was measured.

        A shape that was not measured is scaled by width × height × samples, whatever the length of its
        prompts (the longest are 9 % more tokens at 1024×1024): on the line between its nearest neighbours;
        smaller or larger than all, from the nearest along the line through all (in proportion, where that is
        all there is).
        """
        kind = (width, height, num_samples, prompt_tokens)
        return self._steps.get(kind, width * height * num_samples)

    def has_recent_steps(
        self, width: int, height: int, num_samples: int, prompt_tokens: int, now: float
    ) -> bool:
        """Whether steps of this shape were measured lately, or, if none ever was, others of its size."""
        of_size = self._steps.num_since(lambda kind: kind[:2] == (width, height), now - MAX_AGE_SECONDS)
        own = of_size.get((width, height, num_samples, prompt_tokens))
        return (
            max(of_size.values(), default=0) >= MIN_RECENT_STEPS if own is None else own >= MIN_RECENT_STEPS
        )

    def image_seconds(self, width: int, height: int) -> float:
        """Decoding one image on one rank, scaled by its pixels; 0 while none was measured."""
        return self._images.get((width, height), width * height)

    @property
    def encode_seconds(self) -> float:
        """Reading the prompts of those that start together; 0 while none was measured."""
        return self._prompts.mean_seconds

    @property
    def seconds_between_steps(self) -> float:
        """From the end of one step to the start of the next, where nothing else is to do; 0 while unknown."""
        return self._between_steps.mean_seconds
