"""A process that hosts torch's TCPStore, where the ranks of a generation find each other.

It outlives every rank, so that a survivor's store is never the one that died.
"""

from __future__ import annotations

import signal
import socket
import sys

from setproctitle import setproctitle
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from hidream_grpc.engine.protocol.processes import die_with_parent, leave_signals_to_the_server


def host_store(listener: socket.socket) -> None:
    """Serve the store until this process is killed.

    Args:
        listener: a listening TCP socket on the loopback interface. Left to itself the store would
            listen on every interface, and anybody could write to it.
    """
    setproctitle("hidream-grpc store")
    host, port = listener.getsockname()
    store = TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
    while store is not None:
        signal.pause()


def main() -> None:
    """Entry point where the zygote execs: the listener's file descriptor, the zygote's pid."""
    listener_fd, parent_pid = (int(argument) for argument in sys.argv[1:])
    die_with_parent(parent_pid)
    leave_signals_to_the_server()
    host_store(socket.socket(fileno=listener_fd))


if __name__ == "__main__":
    main()
