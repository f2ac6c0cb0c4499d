"""The process that hosts torch's TCPStore, in which the ranks of a generation find each other.

The store is in no rank, so that it survives the death of any.
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
        listener: a listening TCP socket on the loopback interface. A socket of the store's own would listen
            on every interface, where anybody could write to it.
    """
    setproctitle("hidream-grpc store")
    host, port = listener.getsockname()
    store = TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
    while store is not None:
        signal.pause()


def main() -> None:
    """Entry point where the zygote execs; arguments: file descriptor of the listener, pid of the zygote."""
    listener_fd, parent_pid = (int(argument) for argument in sys.argv[1:])
    die_with_parent(parent_pid)
    leave_signals_to_the_server()
    host_store(socket.socket(fileno=listener_fd))


if __name__ == "__main__":
    main()
