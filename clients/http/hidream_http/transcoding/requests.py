"""A request of HTTP to the message that it stands for: nothing in it is dropped."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from starlette.requests import Request

from hidream_http.json_bodies import require_json
from hidream_http.problems import Violation, invalid
from hidream_http.transcoding.documents import field_named, fields_of, is_map, message_of, parsed, unknown
from hidream_http.transcoding.methods import HttpMethod

LAST_EVENT_ID = "Last-Event-ID"
_IN_PATH = "stands in the path, and must not be given again"
_MAP_KEY = re.compile(r"(.+)\[(.*)\]")


async def message_in(request: Request, method: HttpMethod) -> Message:
    """The message for a method.

    Raises:
        ProblemError: names every field, parameter or header that is unknown or has a wrong value.
    """
    body = await request.body()
    if body and not method.has_body:
        raise invalid(Violation("", f"{method.verb} {method.path} takes no body"))
    if body:
        require_json(request)
    document = parsed(body) if body else {}
    given = {field and field.name for field in (field_named(method.request, name) for name in document)}
    violations = [Violation(name, _IN_PATH) for name in method.path_fields if name in given]
    for name, value in request.path_params.items():
        document[name] = _value(method.request.fields_by_name[name], value)
    violations += _add_query(document, request.query_params.multi_items(), method)
    violations += _add_last_event_id(document, request.headers.get(LAST_EVENT_ID), method)
    if violations:
        raise invalid(*violations)
    return message_of(document, method.request)


def _add_query(
    document: dict[str, Any], pairs: Iterable[tuple[str, str]], method: HttpMethod
) -> list[Violation]:
    violations = []
    for name, value in pairs:
        if method.has_body:
            reason: str | None = "the fields of this method stand in the body, not in the query"
        elif name in method.path_fields:
            reason = _IN_PATH
        else:
            reason = _add(document, method.request, name, value)
        if reason is not None:
            violations.append(Violation(name, reason))
    return violations


def _add(document: dict[str, Any], kind: Descriptor, name: str, value: str) -> str | None:
    """Add a parameter such as `page_size`, `spec.width` or `labels[set]`, or say what is wrong with it."""
    first, dot, rest = name.partition(".")
    if (key := _MAP_KEY.fullmatch(name)) is not None:
        first, dot = key[1], ""
    field = field_named(kind, first)
    if field is None:
        return unknown(kind, first)
    if dot:
        if (inner := fields_of(field)) is None:
            return f"{first} has no fields"
        return _add(document.setdefault(field.name, {}), inner, rest, value)
    if is_map(field):
        if key is None:
            return f"is a map: {first}[KEY]=VALUE"
        entries = document.setdefault(field.name, {})
        if key[2] in entries:
            return "is given twice"
        entries[key[2]] = value
    elif key is not None:
        return f"{first} is no map"
    elif field.is_repeated:
        document.setdefault(field.name, []).append(_value(field, value))
    elif field.name in document:
        return "is given twice"
    else:
        document[field.name] = _value(field, value)
    return None


def _value(field: FieldDescriptor, text: str) -> Any:
    """The value of JSON that a parameter stands for; proto3 takes numbers as strings too."""
    if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        return {"true": True, "false": False}.get(text, text)
    if field.cpp_type == FieldDescriptor.CPPTYPE_ENUM and re.fullmatch(r"\d{1,9}", text):
        return int(text)
    return text


def _add_last_event_id(document: dict[str, Any], text: str | None, method: HttpMethod) -> list[Violation]:
    """Let a stream go on after the last event: where it says more than the address, which stays the same."""
    if text is None:
        return []
    if method.resume_field is None:
        return [Violation(LAST_EVENT_ID, f"{method.verb} {method.path} cannot go on after an event")]
    if not re.fullmatch(r"\d{1,18}", text):
        return [Violation(LAST_EVENT_ID, "is not the id of an event")]
    document[method.resume_field] = text
    return []
