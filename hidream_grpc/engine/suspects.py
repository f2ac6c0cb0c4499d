"""Which job breaks the rank group. Pure: no clock, no process, no torch.

A job is blamed only for what happened while it ran alone: who is in a batch that breaks the group becomes
a suspect and runs alone until it has got further than it was then. A suspect that breaks the group alone
is guilty; so is any job that does it alone for the second time. The others are innocent, whatever they
were in.
"""

from __future__ import annotations

from collections.abc import Mapping


class Strikes:
    """The suspects, in the order in which they run alone."""

    def __init__(self) -> None:
        # Claim to the progress that clears it.
        self._suspects: dict[str, int] = {}
        self._struck_alone: set[str] = set()

    @property
    def suspect(self) -> str | None:
        """The job that must run alone now; None when all may run."""
        return next(iter(self._suspects), None)

    def strike(self, suspects: Mapping[str, int], *, was_alone: bool) -> str | None:
        """Note that work went wrong which these jobs may have caused.

        Args:
            suspects: their progress then, a number that grows with all that they do.
            was_alone: whether the work was of one job only, this one.

        Returns:
            The job that is guilty, if that is known.
        """
        if was_alone:
            (claim_id,) = suspects
            if claim_id in self._suspects or claim_id in self._struck_alone:
                self.forget(claim_id)
                return claim_id
            self._struck_alone.add(claim_id)
        for claim_id, progress in suspects.items():
            self._suspects[claim_id] = max(progress, self._suspects.get(claim_id, progress))
        return None

    def progressed(self, claim_id: str, progress: int) -> None:
        """Note how far a job has come; a suspect that went further than it was is cleared."""
        if claim_id in self._suspects and progress > self._suspects[claim_id]:
            del self._suspects[claim_id]

    def forget(self, claim_id: str) -> None:
        """Forget a job that has ended."""
        self._suspects.pop(claim_id, None)
        self._struck_alone.discard(claim_id)
