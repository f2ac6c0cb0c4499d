"""Frames between the server and the processes that it starts.

A frame is the length of its body (4 bytes, big endian) and the body: one message of
`engine/protocol/messages.py` as msgpack. The server's side is asyncio, a child's side blocks. End of file
is the notice that the peer is dead; a frame that breaks off counts as that too.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec

MAX_FRAME_BYTES = 256 * 1024 * 1024
STREAM_BUFFER_BYTES = 1024 * 1024
_LENGTH = struct.Struct("!I")

Received = TypeVar("Received")


class FrameError(Exception):
    """The peer sent what is no frame of ours, or we were about to; the connection is of no more use."""


def encode_frame(message: msgspec.Struct) -> bytes:
    """The bytes of one frame.

    Raises:
        FrameError: the message is larger than `MAX_FRAME_BYTES`.
    """
    body = msgspec.msgpack.encode(message, enc_hook=_encode_path)
    _check_length(len(body))
    return _LENGTH.pack(len(body)) + body


class MessageDecoder(Generic[Received]):
    """Turns the body of a frame into a message of one tagged union.

    Args:
        messages: the union of the messages that may come, such as `messages.Event`.
    """

    def __init__(self, messages: Any) -> None:
        self._decoder = msgspec.msgpack.Decoder(messages, dec_hook=_decode_path)

    def decode(self, body: bytes | bytearray) -> Received:
        """Raises FrameError when the body is no message of the union."""
        try:
            message: Received = self._decoder.decode(body)
        except msgspec.DecodeError as error:
            raise FrameError(f"not a message of this side: {error}") from error
        return message


class BlockingChannel(Generic[Received]):
    """The child's side: every call blocks, nothing is buffered, so that `select` sees each frame.

    Args:
        connection: a connected stream socket; the channel owns it from here on.
        messages: the union of the messages that may come.
    """

    def __init__(self, connection: socket.socket, messages: Any) -> None:
        self._connection = connection
        self._decoder = MessageDecoder[Received](messages)

    @classmethod
    def connect(cls, socket_path: Path, messages: Any) -> BlockingChannel[Received]:
        """Connect to a Unix socket."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.connect(str(socket_path))
        return cls(connection, messages)

    def fileno(self) -> int:
        """File descriptor, for `select`."""
        return self._connection.fileno()

    def send(self, message: msgspec.Struct) -> None:
        """Send one message; raises ConnectionError when the peer has gone."""
        self._connection.sendall(encode_frame(message))

    def receive(self) -> Received | None:
        """The next message, or None when the peer has gone."""
        length = self._receive_exactly(_LENGTH.size)
        if length is None:
            return None
        body = self._receive_exactly(_read_length(length))
        return None if body is None else self._decoder.decode(body)

    def close(self) -> None:
        """Close this process's end."""
        self._connection.close()

    def _receive_exactly(self, num_bytes: int) -> bytearray | None:
        buffer = bytearray(num_bytes)
        unread = memoryview(buffer)
        while unread:
            try:
                received_bytes = self._connection.recv_into(unread)
            except ConnectionResetError:
                return None
            if received_bytes == 0:
                return None
            unread = unread[received_bytes:]
        return buffer


class AsyncChannel(Generic[Received]):
    """The server's side.

    Args:
        reader, writer: of one connection; the channel owns them from here on.
        messages: the union of the messages that may come.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, messages: Any) -> None:
        self._reader = reader
        self._writer = writer
        self._decoder = MessageDecoder[Received](messages)

    async def send(self, message: msgspec.Struct) -> None:
        """Send one message. A peer that has gone is no error here: `receive` is what tells."""
        with contextlib.suppress(OSError):
            self._writer.write(encode_frame(message))
            await self._writer.drain()

    async def receive(self) -> Received | None:
        """The next message, or None when the peer has gone.

        Raises:
            FrameError: what came is no message of the union.
        """
        try:
            length = await self._reader.readexactly(_LENGTH.size)
            body = await self._reader.readexactly(_read_length(length))
        except (asyncio.IncompleteReadError, OSError):
            # Whatever broke the connection, nothing comes from it any more.
            return None
        return self._decoder.decode(body)

    async def close(self) -> None:
        """Close the connection once what was sent is out; may be called twice."""
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()


def _read_length(header: bytes | bytearray) -> int:
    length: int = _LENGTH.unpack(header)[0]
    _check_length(length)
    return length


def _check_length(length: int) -> None:
    if length > MAX_FRAME_BYTES:
        raise FrameError(f"a frame of {length} bytes; {MAX_FRAME_BYTES} are allowed")


def _encode_path(value: object) -> bytes:
    if isinstance(value, Path):
        # The name of a file need not be text.
        return bytes(value)
    raise NotImplementedError(f"no message carries a {type(value).__name__}")


def _decode_path(expected: type, value: Any) -> Any:
    if issubclass(expected, Path):
        return Path(os.fsdecode(value))
    raise NotImplementedError(f"no message carries a {expected.__name__}")
