"""What an operator reads about a setting, in `serve --help` and in docs/configuration.md."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le
from pydantic.fields import FieldInfo


class Group(StrEnum):
    """The headings of the settings, in the order in which they are shown."""

    MODEL = "Model"
    DEVICES = "Devices"
    LISTENING = "Listening"
    JOBS = "Jobs"
    IMAGES = "Images"
    LIMITS = "Limits"
    CALLERS = "Callers"
    LOGGING = "Logging"


@dataclass(frozen=True, slots=True)
class Help:
    """The words about a setting that its type does not say.

    Attributes:
        group: the heading that it stands under.
        meaning: what it sets, with its unit.
        when_absent: what happens without it, where the default is None.
    """

    group: Group
    meaning: str
    when_absent: str | None = None


INT64_MAX = 2**63 - 1
"""The bound of numbers that the contract carries as 64 bits; it is not worth a reader's time."""

_TYPE_NAMES = {bool: "true|false", int: "INTEGER", float: "NUMBER", str: "TEXT", Path: "PATH"}


def help_of(field: FieldInfo) -> Help:
    """The words that were declared with a field of `Settings`."""
    (found,) = (item for item in field.metadata if isinstance(item, Help))
    return found


def type_words(field: FieldInfo) -> str:
    """The type of a value, such as "INTEGER" or "text|json"."""
    return "|".join(_type_names(field.annotation))


def range_words(field: FieldInfo) -> str | None:
    """The values that a number may have, such as "1 to 64"; None where the type says it all."""
    bounds = field.metadata
    least = next((f"{bound.ge}" for bound in bounds if isinstance(bound, Ge)), None)
    most = next((f"{bound.le}" for bound in bounds if isinstance(bound, Le) and bound.le != INT64_MAX), None)
    if least and most:
        return f"{least} to {most}"
    above = next((f"above {bound.gt}" for bound in bounds if isinstance(bound, Gt)), None)
    words = (f"at least {least}" if least else above, f"at most {most}" if most else None)
    return ", ".join(filter(None, words)) or None


def default_words(field: FieldInfo) -> str:
    """The default, as an operator would write it, or what happens without a value."""
    if field.default is None:
        return help_of(field).when_absent or "none"
    if isinstance(field.default, bool):
        return str(field.default).lower()
    return f"{field.default:g}" if isinstance(field.default, float) else str(field.default)


def help_words(field: FieldInfo) -> str:
    """What the help says of a flag: its meaning, then its range and default in brackets."""
    facts = [range_words(field), f"default: {default_words(field)}"]
    return f"{help_of(field).meaning} [{'; '.join(filter(None, facts))}]"


def _type_names(annotation: Any) -> Iterator[str]:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        yield from _type_names(arguments[0])
    elif origin in (Union, UnionType):
        for argument in arguments:
            yield from _type_names(argument)
    elif origin is Literal:
        yield from arguments
    elif annotation is not type(None):
        yield _TYPE_NAMES[annotation]
