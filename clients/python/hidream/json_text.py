"""Answers and events as JSON for programs: the field names of the contract, or those of `hidream.events`."""

from __future__ import annotations

import dataclasses
import json
import re
from datetime import datetime
from pathlib import Path
from typing import Any

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

from hidream.events import Event
from hidream.images import Image


def message_json(message: Message) -> str:
    """Return a message as JSON over several lines, with every field."""
    return json.dumps(_dictionary(message), indent=2, ensure_ascii=False)


def message_json_line(message: Message) -> str:
    """Return a message as JSON on one line, with every field."""
    return json.dumps(_dictionary(message), ensure_ascii=False)


def event_json_line(event: Event, path: Path | None = None) -> str:
    """Return one event as JSON on one line: its kind, and its fields without the bytes of images.

    Args:
        event: any event.
        path: where the image that it finished was written.
    """
    kind = re.sub(r"(?<!^)(?=[A-Z])", "_", type(event).__name__).lower()
    place = {} if path is None else {"path": str(path)}
    return json.dumps({"event": kind, **_fields(event), **place}, ensure_ascii=False)


def _dictionary(message: Message) -> dict[str, Any]:
    return MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)


def _fields(value: Any) -> dict[str, Any]:
    named = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return {name: _plain(value) for name, value in named.items() if name != "data"}


def _plain(value: Any) -> Any:
    match value:
        case Message():
            return _dictionary(value)
        case datetime():
            return value.isoformat()
        case bytes():
            return value.hex()
        case Image():
            return {**_fields(value), "size_bytes": len(value.data)}
        case _ if dataclasses.is_dataclass(value):
            return _fields(value)
        case _:
            return value
