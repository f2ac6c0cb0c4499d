"""How the messages of a stream are told apart: server-sent events, or one line of JSON each."""

from __future__ import annotations

from dataclasses import dataclass

from google.protobuf import json_format
from google.protobuf.message import Message

from hidream_http.problems import Problem
from hidream_http.transcoding.methods import HttpMethod

_EVENT_STREAM = "text/event-stream"
_LINES = "application/x-ndjson"


def as_json(message: Message) -> str:
    """A message in one line, as proto3 has it."""
    return json_format.MessageToJson(message, indent=None, ensure_ascii=False)


@dataclass(frozen=True, slots=True)
class Framing:
    """How to write the messages of one stream.

    Attributes:
        media_type: of the stream.
        is_event_stream: whether they are server-sent events.
        event_field: has the sequence of a message, where one has.
    """

    media_type: str
    is_event_stream: bool
    event_field: str | None

    @classmethod
    def asked_for(cls, accept: str, method: HttpMethod) -> Framing:
        """What a request accepts."""
        if _EVENT_STREAM in accept.lower():
            return cls(_EVENT_STREAM, True, method.event_field)
        return cls(_LINES, False, None)

    def message(self, message: Message) -> bytes:
        """One message."""
        document = as_json(message)
        if not self.is_event_stream:
            return f"{document}\n".encode()
        sequence = getattr(message, self.event_field).sequence if self.event_field else 0
        number = f"id: {sequence}\n" if sequence else ""
        return f"{number}data: {document}\n\n".encode()

    def problem(self, problem: Problem) -> bytes:
        """What ends a stream before its end; the connection is then broken off."""
        document = problem.document()
        if not self.is_event_stream:
            return f'{{"error":{document}}}\n'.encode()
        seconds = problem.retry_after_seconds
        retry = "" if seconds is None else f"retry: {round(1000 * seconds)}\n"
        return f"{retry}event: problem\ndata: {document}\n\n".encode()

    @property
    def sign_of_life(self) -> bytes:
        """What no reader sees, and keeps proxies from closing an idle stream; empty for none."""
        return b": \n\n" if self.is_event_stream else b""
