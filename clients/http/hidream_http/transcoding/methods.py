"""The methods of the service as the contract's `google.api.http` annotations say to call them over HTTP."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from google.api import annotations_pb2, http_pb2
from google.protobuf.descriptor import Descriptor, MethodDescriptor, ServiceDescriptor

_SEQUENCE = "sequence"
_AFTER_SEQUENCE = "after_sequence"
_IMAGE_CHUNK = "hidream.v1.ImageChunk"


@dataclass(frozen=True, slots=True)
class HttpMethod:
    """One method of the service, and the requests of HTTP that call it.

    Attributes:
        name: of the method, such as `GetJob`.
        request: what it takes.
        response: what it answers, once or many times.
        is_stream: whether it answers many times.
        verb: of HTTP.
        path: a template as Starlette has it, such as `/v1/jobs/{job_id}:cancel`.
        has_body: whether the body is the request; otherwise the query has its fields.
    """

    name: str
    request: Descriptor
    response: Descriptor
    is_stream: bool
    verb: str
    path: str
    has_body: bool

    @property
    def path_fields(self) -> frozenset[str]:
        """The fields of the request that stand in the path."""
        return frozenset(re.findall(r"\{(\w+)\}", self.path))

    @property
    def event_field(self) -> str | None:
        """The field of a response whose own field `sequence` numbers it; None where none does."""
        return next(
            (
                field.name
                for field in self.response.fields
                if field.message_type is not None and _SEQUENCE in field.message_type.fields_by_name
            ),
            None,
        )

    @property
    def resume_field(self) -> str | None:
        """The field of the request that says after which sequence to go on; None where it has none."""
        return _AFTER_SEQUENCE if _AFTER_SEQUENCE in self.request.fields_by_name else None

    @property
    def is_endless(self) -> bool:
        """Whether its messages go on until the caller leaves: no event of them can be the last."""
        return self.is_stream and not self.is_image and self.event_field is None

    @property
    def is_image(self) -> bool:
        """Whether the responses are the pieces of one file."""
        return self.is_stream and [
            field.message_type and field.message_type.full_name for field in self.response.fields
        ] == [_IMAGE_CHUNK]


def http_methods(service: ServiceDescriptor) -> Iterator[HttpMethod]:
    """Every binding of every method, those with a verb of their own (`:cancel`) before `{job_id}` takes it.

    Raises:
        ValueError: an annotation says what this bridge cannot do.
    """
    found = [
        _http_method(method, rule)
        for method in service.methods
        for main in [method.GetOptions().Extensions[annotations_pb2.http]]
        for rule in (main, *main.additional_bindings)
    ]
    return iter(sorted(found, key=lambda method: ":" not in method.path))


def _http_method(method: MethodDescriptor, rule: http_pb2.HttpRule) -> HttpMethod:
    verb = rule.WhichOneof("pattern")
    if verb in (None, "custom") or rule.body not in ("", "*") or rule.response_body:
        raise ValueError(f"{method.full_name}: no annotation, or one that this bridge does not know")
    path = getattr(rule, verb)
    if re.search(r"[*=]", path):
        raise ValueError(f"{method.full_name}: {path} has a pattern that this bridge does not know")
    return HttpMethod(
        method.name,
        method.input_type,
        method.output_type,
        method.server_streaming,
        verb.upper(),
        path,
        rule.body == "*",
    )
