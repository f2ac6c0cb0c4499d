"""One line in the log when something is lost, and one when it is back, however often it is tried."""

from __future__ import annotations

import logging


class Outage:
    """Whether one activity fails at the moment.

    Args:
        log: of the module whose activity it is.
        activity: what cannot be done, as in "cannot claim jobs".
    """

    def __init__(self, log: logging.Logger, activity: str) -> None:
        self._log = log
        self._activity = activity
        self._has_begun = False

    def note_failure(self, error: Exception) -> None:
        """Say so, unless it was said."""
        if not self._has_begun:
            self._has_begun = True
            self._log.warning("cannot %s: %s; trying again", self._activity, error)

    def note_success(self) -> None:
        """Say that it works again, if it did not."""
        if self._has_begun:
            self._has_begun = False
            self._log.info("can %s again", self._activity)
