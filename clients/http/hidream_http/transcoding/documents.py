"""JSON to messages by proto3's rules, with everything that is wrong named by its field."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from google.protobuf import json_format
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from hidream_http.problems import Violation, invalid

_MAX_SHOWN_CHARACTERS = 80
# Requests have five; Python runs out of stack at some hundreds.
_MAX_DEPTH = 50
_TOO_DEEP = Violation("", f"the body is nested deeper than {_MAX_DEPTH} levels")
_WELL_KNOWN = "google.protobuf."
_INTEGERS = {
    FieldDescriptor.CPPTYPE_INT32,
    FieldDescriptor.CPPTYPE_INT64,
    FieldDescriptor.CPPTYPE_UINT32,
    FieldDescriptor.CPPTYPE_UINT64,
}
_KINDS = {
    FieldDescriptor.CPPTYPE_BOOL: "true or false",
    FieldDescriptor.CPPTYPE_FLOAT: "a number",
    FieldDescriptor.CPPTYPE_DOUBLE: "a number",
    FieldDescriptor.CPPTYPE_STRING: "a string",
}
_WELL_KNOWN_KINDS = {
    "Duration": 'a duration such as "1.5s"',
    "Timestamp": 'a time such as "2026-01-31T12:00:00Z"',
}


def parsed(body: bytes) -> dict[str, Any]:
    """The object that a body is.

    Raises:
        ProblemError: it is none, it has a name twice, or it is nested too deep.
    """
    try:
        document = json.loads(body, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except ValueError as error:
        raise invalid(Violation("", f"the body is not JSON: {error}")) from None
    except RecursionError:
        raise invalid(_TOO_DEEP) from None
    if not isinstance(document, dict):
        raise invalid(Violation("", "the body is not a JSON object"))
    if _is_deeper_than(_MAX_DEPTH, document):
        raise invalid(_TOO_DEEP)
    return document


def message_of(document: dict[str, Any], kind: Descriptor) -> Message:
    """The message that an object stands for.

    Raises:
        ProblemError: names every field that is unknown or has a value that is none of its kind.
    """
    # First: the library takes a list for an empty message, and one field by both of its names.
    if violations := tuple(_violations(document, kind, "")):
        raise invalid(*violations)
    try:
        return json_format.ParseDict(document, GetMessageClass(kind)())
    except (json_format.ParseError, ValueError, TypeError, RecursionError) as error:
        raise invalid(Violation("", str(error))) from None


def field_named(kind: Descriptor, name: str) -> FieldDescriptor | None:
    """The field with a name, as the contract spells it or as JSON does."""
    return kind.fields_by_name.get(name) or kind.fields_by_camelcase_name.get(name)


def unknown(kind: Descriptor, name: str) -> str:
    """Say that a message has no such field, and which may be meant."""
    guess = get_close_matches(name, list(kind.fields_by_name), n=1)
    return f"is no field of {kind.name}" + (f" (did you mean {guess[0]}?)" if guess else "")


def fields_of(field: FieldDescriptor) -> Descriptor | None:
    """The message that a field is, whose fields can be named; None for lists, maps and values of JSON."""
    kind = field.message_type
    if kind is None or field.is_repeated or kind.full_name.startswith(_WELL_KNOWN):
        return None
    return kind


def is_map(field: FieldDescriptor) -> bool:
    """Whether a field is a map."""
    return field.message_type is not None and field.message_type.GetOptions().map_entry


def _violations(document: Mapping[str, Any], kind: Descriptor, path: str) -> Iterator[Violation]:
    seen: set[str] = set()
    for name, value in document.items():
        field = field_named(kind, name)
        if field is None:
            yield Violation(path + name, unknown(kind, name))
            continue
        here = path + field.name
        if field.name in seen:
            yield Violation(here, "is given twice, by both of its names")
        seen.add(field.name)
        yield from _violations_of_value(field, value, here)


def _violations_of_value(field: FieldDescriptor, value: Any, here: str) -> Iterator[Violation]:
    if value is None:
        return
    if (kind := fields_of(field)) is not None:
        if isinstance(value, dict):
            yield from _violations(value, kind, f"{here}.")
        else:
            yield Violation(here, f"{_shown(value)} is not an object")
    elif field.is_repeated and not is_map(field) and isinstance(value, list):
        for index, entry in enumerate(value):
            at = f"{here}[{index}]"
            if field.message_type is not None and isinstance(entry, dict):
                yield from _violations(entry, field.message_type, f"{at}.")
            elif not _is_accepted(field, [entry]):
                yield Violation(at, f"{_shown(entry)} is not {_kind(field)}")
    elif not _is_accepted(field, value):
        wanted = _kind(field)
        if field.is_repeated:
            wanted = "an object of strings" if is_map(field) else f"a list, each entry {wanted}"
        yield Violation(here, f"{_shown(value)} is not {wanted}")


def _is_accepted(field: FieldDescriptor, value: Any) -> bool:
    assert field.containing_type is not None, "no field of ours is an extension"
    try:
        json_format.ParseDict({field.name: value}, GetMessageClass(field.containing_type)())
    except (json_format.ParseError, ValueError, TypeError):
        return False
    return True


def _kind(field: FieldDescriptor) -> str:
    if field.enum_type is not None:
        return f"one of {', '.join(field.enum_type.values_by_name)}"
    if field.message_type is not None:
        return _WELL_KNOWN_KINDS.get(field.message_type.name, "an object")
    if field.cpp_type in _INTEGERS:
        bits = 64 if field.cpp_type in (FieldDescriptor.CPPTYPE_INT64, FieldDescriptor.CPPTYPE_UINT64) else 32
        return f"an integer of {bits} bits"
    if field.type == FieldDescriptor.TYPE_BYTES:
        return "bytes in base64"
    return _KINDS[field.cpp_type]


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _MAX_SHOWN_CHARACTERS else text[:_MAX_SHOWN_CHARACTERS] + "…"


def _is_deeper_than(depth: int, document: dict[str, Any]) -> bool:
    level: list[Any] = [document]
    for _ in range(depth):
        level = [
            value
            for one in level
            if isinstance(one, dict | list)
            for value in (one.values() if isinstance(one, dict) else one)
        ]
    return any(isinstance(one, dict | list) for one in level)


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} is given twice")
    return document


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")
