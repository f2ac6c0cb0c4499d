"""The client of a hidream-grpc server; its modules are listed in the README."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hidream.aio import AsyncClient
    from hidream.client import Client

__all__ = ["AsyncClient", "Client", "__version__"]

__version__ = "0.1.0"

# Says nothing until a program asks for it.
logging.getLogger("hidream").addHandler(logging.NullHandler())


def __getattr__(name: str) -> Any:
    # The stubs alone, and the start of the command, need neither client.
    if name == "AsyncClient":
        from hidream.aio import AsyncClient

        return AsyncClient
    if name == "Client":
        from hidream.client import Client

        return Client
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
