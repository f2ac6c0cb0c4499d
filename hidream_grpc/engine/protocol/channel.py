"""Frames between the server and the processes that it starts.

A frame is the length of its body (4 bytes, big endian) and the body: one message of
`engine/protocol/messages.py` as msgpack. The server's side is asyncio, a child's side blocks. End of file
means that the peer is dead, and so does a frame that breaks off.
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
    """A frame is not one of this protocol, or too large; the connection cannot be used any more."""


def encode_frame(message: msgspec.Struct) -> bytes:
    """Encode a message as the bytes of one frame.

    Raises:
        FrameError: the message is larger than `MAX_FRAME_BYTES`.
    """
    body = msgspec.msgpack.encode(message, enc_hook=_encode_path)
    _check_length(len(body))
    return _LENGTH.pack(len(body)) + body


class MessageDecoder(Generic[Received]):
    """Turns the body of a frame into a message of one tagged union.

    Args:
        messages: the union of the messages that may be received, such as `messages.Event`.
    """

    def __init__(self, messages: Any) -> None:
        self._decoder = msgspec.msgpack.Decoder(messages, dec_hook=_decode_path)

    def decode(self, body: bytes | bytearray) -> Received:
        """Decode the body of a frame; raise FrameError when it is no message of the union."""
        try:
            message: Received = self._decoder.decode(body)
        except msgspec.DecodeError as error:
            raise FrameError(f"not a message of this side: {error}") from error
        return message


class BlockingChannel(Generic[Received]):
    """The child's end of a connection: calls block, nothing is buffered, so that `select` sees each frame.

    Args:
        connection: a connected stream socket, which the channel owns from then on.
        messages: the union of the messages that may be received.
    """

    def __init__(self, connection: socket.socket, messages: Any) -> None:
        self._connection = connection
        self._decoder = MessageDecoder[Received](messages)

    @classmethod
    def connect(cls, socket_path: Path, messages: Any) -> BlockingChannel[Received]:
        """Open a channel to a Unix socket."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.connect(str(socket_path))
        return cls(connection, messages)

    def fileno(self) -> int:
        """File descriptor of the connection, for `select`."""
        return self._connection.fileno()

    def send(self, message: msgspec.Struct) -> None:
        """Send one message; raise ConnectionError when the peer is gone."""
        self._connection.sendall(encode_frame(message))

    def receive(self) -> Received | None:
        """Wait for the next message; None when the peer is gone."""
        length = self._receive_exactly(_LENGTH.size)
        if length is None:
            return None
        body = self._receive_exactly(_read_length(length))
        return None if body is None else self._decoder.decode(body)

    def close(self) -> None:
        """Close this process's end of the connection."""
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
    """The server's end of a connection.

    Args:
        reader, writer: the streams of one connection, which the channel owns from then on.
        messages: the union of the messages that may be received.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, messages: Any) -> None:
        self._reader = reader
        self._writer = writer
        self._decoder = MessageDecoder[Received](messages)

    async def send(self, message: msgspec.Struct) -> None:
        """Send one message. A peer that is gone raises no error here, but ends `receive`."""
        with contextlib.suppress(OSError):
            self._writer.write(encode_frame(message))
            await self._writer.drain()

    async def receive(self) -> Received | None:
        """Wait for the next message; None when the peer is gone.

        Raises:
            FrameError: the frame is no message of the union.
        """
        try:
            length = await self._reader.readexactly(_LENGTH.size)
            body = await self._reader.readexactly(_read_length(length))
        except (asyncio.IncompleteReadError, OSError):
            # However the connection broke, no more messages come.
            return None
        return self._decoder.decode(body)

    async def close(self) -> None:
        """Close the connection once all messages are sent; may be called twice."""
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
        # The name of a file may be no valid text.
        return bytes(value)
    raise NotImplementedError(f"no message carries a {type(value).__name__}")


def _decode_path(expected: type, value: Any) -> Any:
    if issubclass(expected, Path):
        return Path(os.fsdecode(value))
    raise NotImplementedError(f"no message carries a {expected.__name__}")
