"""Entry point of the `hidream` command: what happens before its modules are imported."""

from __future__ import annotations

import signal


def main() -> None:
    """Run the command; an interrupt ends it without a traceback, whenever it comes."""
    _end_silently_at_ctrl_c()
    # Takes a moment, in which an interrupt would be a traceback.
    from hidream.commands import app

    # Where whoever started this process has it ignored, it stays so.
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # What ends the command in order, as the end of a container, means the same.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        app()
    finally:
        # The second interrupt of an impatient user.
        _end_silently_at_ctrl_c()


def _end_silently_at_ctrl_c() -> None:
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
