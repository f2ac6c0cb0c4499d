"""Ports for processes that must be told theirs beforehand, or take the same one again."""

from __future__ import annotations

import random
import socket

# Below those that the system gives to whoever asks for any, and above those of well-known services.
FIRST_PORT, LAST_PORT = 20_000, 32_000


def unused_port() -> int:
    """A port of 127.0.0.1 that nobody listens on, and that nobody gets by chance."""
    while True:
        port = random.SystemRandom().randint(FIRST_PORT, LAST_PORT)
        with socket.socket() as listener:
            # As servers do: connections that have just ended there do no harm.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
