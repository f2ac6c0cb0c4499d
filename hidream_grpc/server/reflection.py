"""Server reflection, with which tools call the service without its proto files."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import grpc.aio
from google.protobuf import descriptor_pool
from google.protobuf.descriptor import FileDescriptor
from grpc_reflection.v1alpha import reflection


def enable_reflection(server: grpc.aio.Server, service_names: Iterable[str]) -> None:
    """Let callers ask the server which services and methods it has, and for the files that define them."""
    names = (*service_names, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server, SymbolPool(descriptor_pool.Default()))


class SymbolPool:
    """A descriptor pool in which methods are symbols too, as the reflection protocol has it.

    protobuf's own pool knows services, messages, fields and enums by name, but not methods.
    """

    def __init__(self, pool: descriptor_pool.DescriptorPool) -> None:
        """Take the pool that finds everything else."""
        self._pool = pool

    def FindFileContainingSymbol(self, symbol: str) -> FileDescriptor:  # noqa: N802
        """Find the file that defines a symbol.

        Raises:
            KeyError: no file defines it.
        """
        try:
            return self._pool.FindFileContainingSymbol(symbol)
        except KeyError:
            return self._pool.FindMethodByName(symbol).containing_service.file

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pool, name)
