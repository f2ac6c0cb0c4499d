"""Entry point of the `hidream-grpc` command: what happens before the server's modules are imported."""

from __future__ import annotations

import signal


def main() -> None:
    """Run the command, in a process that it has to itself."""
    _end_silently_at_ctrl_c()
    # Takes a second.
    from hidream_grpc.cli import run_command
    from hidream_grpc.log_streams import protect_stderr

    protect_stderr()
    try:
        run_command()
    finally:
        # The event loop has put Python's own handler back.
        _end_silently_at_ctrl_c()


def _end_silently_at_ctrl_c() -> None:
    # Where whoever started this process has it ignored, it stays so.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


if __name__ == "__main__":
    main()
