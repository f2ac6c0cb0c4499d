"""How much work each caller may ask for within a minute. Pure, but for what it remembers."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from hidream_grpc.errors import CallerQuotaError, FieldViolation, InvalidRequestError

WINDOW_SECONDS = 60.0


@dataclass(frozen=True, slots=True, eq=False)
class _Charge:
    """Work that was accepted at a moment of the clock; two of the same amount are not the same."""

    time: float
    pixel_steps: int


class CallerQuotas:
    """Counts each caller's work: no 60 seconds hold more of it than the limit.

    A token bucket would let up to twice the limit through. What it remembers is one entry for each
    request that was accepted in the last minute, in this process.
    """

    def __init__(self, max_pixel_steps_per_minute_per_caller: int | None, clock: Callable[[], float]) -> None:
        """A limit of None lets everything through; clock gives seconds and never goes back."""
        self._max_pixel_steps = max_pixel_steps_per_minute_per_caller
        self._clock = clock
        self._charges: dict[str, deque[_Charge]] = {}

    @property
    def has_limit(self) -> bool:
        """Whether anything is counted."""
        return self._max_pixel_steps is not None

    @contextmanager
    def charged(self, caller: str, pixel_steps: int) -> Iterator[None]:
        """Charge a caller for work that is accepted within; an error from there takes the charge back.

        Raises:
            CallerQuotaError: it does not fit now; says when it will.
            InvalidRequestError: it would not fit into any minute.
        """
        if self._max_pixel_steps is None:
            yield
            return
        charge = self._charge(caller, pixel_steps, self._max_pixel_steps)
        try:
            yield
        except BaseException:
            self._take_back(caller, charge)
            raise

    def _charge(self, caller: str, pixel_steps: int, max_pixel_steps: int) -> _Charge:
        if pixel_steps > max_pixel_steps:
            description = (
                f"width × height × num_inference_steps × num_images, added up, must be at most "
                f"{max_pixel_steps} (max_pixel_steps_per_minute_per_caller), is {pixel_steps}"
            )
            raise InvalidRequestError((FieldViolation("requests", description),))
        now = self._clock()
        self._forget(now)
        charges = self._charges.get(caller, deque())
        excess = sum(charge.pixel_steps for charge in charges) + pixel_steps - max_pixel_steps
        if excess > 0:
            retry_after_seconds = _time_until_less(charges, excess) - now
            raise CallerQuotaError(caller, pixel_steps, max_pixel_steps, retry_after_seconds)
        charge = _Charge(now, pixel_steps)
        self._charges.setdefault(caller, charges).append(charge)
        return charge

    def _forget(self, now: float) -> None:
        """Drop what has left the window, and the callers of whom nothing is left."""
        for caller, charges in list(self._charges.items()):
            while charges and charges[0].time + WINDOW_SECONDS <= now:
                charges.popleft()
            if not charges:
                del self._charges[caller]

    def _take_back(self, caller: str, charge: _Charge) -> None:
        # It may have left the window meanwhile.
        if charge in self._charges.get(caller, ()):
            self._charges[caller].remove(charge)


def _time_until_less(charges: deque[_Charge], excess: int) -> float:
    """When at least this much of the work will have left the window."""
    for charge in charges:
        excess -= charge.pixel_steps
        if excess <= 0:
            break
    return charge.time + WINDOW_SECONDS
