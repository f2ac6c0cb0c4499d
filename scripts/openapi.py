"""Writes the OpenAPI document of the HTTP bridge, made by protoc-gen-openapi of the contract's annotations.

The plugin knows the contract, not the bridge: streams, images, headers and errors are added here.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from google.protobuf.descriptor import FieldDescriptor

import hidream_http
from hidream_http.problems import MEDIA_TYPE as PROBLEM_TYPE
from hidream_http.transcoding.documents import is_map
from hidream_http.transcoding.methods import HttpMethod, http_methods
from hidream_http.transcoding.requests import LAST_EVENT_ID
from hidream_http.transcoding.routes import SERVICE

PROJECT = Path(__file__).parent.parent
DOCUMENT = PROJECT / "clients/http/hidream_http/documentation/openapi.json"
OPTIONS = {"title": "hidream-grpc", "version": hidream_http.__version__, "enum_type": "string"}
IMAGE_TYPES = ("image/png", "image/jpeg", "image/webp")

_TEXT = {"type": "string"}
_TIMEOUT = {
    "name": "Request-Timeout",
    "in": "header",
    "description": "Seconds after which the call is given up, as a deadline of gRPC.",
    "schema": {"type": "number"},
}
_LAST_EVENT = {
    "name": LAST_EVENT_ID,
    "in": "header",
    "description": "Goes on after this event: the `id` of the last one that was received.",
    "schema": _TEXT,
}
_RANGE = {
    "name": "Range",
    "in": "header",
    "description": "A part of the file: `bytes=START-` goes on with a download.",
    "schema": _TEXT,
}
_PROBLEM = {
    "type": "object",
    "description": "Why a request was not answered (RFC 9457).",
    "required": ["type", "title", "status", "detail"],
    "properties": {
        "type": _TEXT,
        "title": {**_TEXT, "description": "The status in words."},
        "status": {"type": "integer", "description": "The status of HTTP."},
        "detail": {**_TEXT, "description": "One line for people."},
        "code": {**_TEXT, "description": "The status of gRPC, by name."},
        "violations": {
            "type": "array",
            "description": "All that is wrong with the request.",
            "items": {"type": "object", "properties": {"field": _TEXT, "description": _TEXT}},
        },
        "retryAfterSeconds": {"type": "number", "description": "When to try again."},
        "errorId": {**_TEXT, "description": "Stands in the log of the server beside the reason."},
        "details": {
            "type": "array",
            "description": "The details of the server's status.",
            "items": {"$ref": "#/components/schemas/GoogleProtobufAny"},
        },
    },
}


def document() -> dict[str, Any]:
    """The routes of the contract as the bridge serves them."""
    made = _of_plugin()
    paths: dict[str, dict[str, Any]] = {}
    for method in http_methods(SERVICE):
        path = _json_path(method)
        operation = made["paths"][path][method.verb.lower()]
        _add_what_the_bridge_does(operation, method)
        paths.setdefault(path, {})[method.verb.lower()] = operation
    schemas = {**made["components"]["schemas"], "Problem": _PROBLEM}
    bearer = {"type": "http", "scheme": "bearer", "description": "Where the server asks for tokens."}
    described = {
        "openapi": made["openapi"],
        "info": made["info"],
        "tags": made["tags"],
        "paths": {path: paths[path] for path in sorted(paths)},
        "security": [{}, {"token": []}],
        "components": {"securitySchemes": {"token": bearer}, "schemas": schemas},
    }
    _fit_bodies(described)
    _remove_unused_schemas(described)
    return _without_indents(described)


def _of_plugin() -> dict[str, Any]:
    protos = sorted(str(path) for path in (PROJECT / "protos/hidream/v1").glob("*.proto"))
    with tempfile.TemporaryDirectory() as folder:
        options = ",".join(
            f"{name}={value}" for name, value in {**OPTIONS, "default_response": "false"}.items()
        )
        flags = [f"--openapi_out={folder}", f"--openapi_opt={options}", "-I", str(PROJECT / "protos")]
        subprocess.run([sys.executable, "-m", "grpc_tools.protoc", *flags, *protos], check=True)
        made: dict[str, Any] = yaml.safe_load((Path(folder) / "openapi.yaml").read_text(encoding="utf-8"))
    return made


def _json_path(method: HttpMethod) -> str:
    fields = method.request.fields_by_name
    return re.sub(r"\{(\w+)\}", lambda match: f"{{{fields[match[1]].json_name}}}", method.path)


def _add_what_the_bridge_does(operation: dict[str, Any], method: HttpMethod) -> None:
    parameters = operation.setdefault("parameters", [])
    success = operation["responses"]["200"]
    if method.is_image:
        parameters[:] = [each for each in parameters if each["name"] != "offset"]
        parameters.append(_RANGE)
        file = {"schema": {"type": "string", "format": "binary"}}
        success["content"] = dict.fromkeys(IMAGE_TYPES, file)
        operation["responses"]["206"] = {**success, "description": "The part that was asked for."}
        operation["responses"]["304"] = {
            "description": "The `ETag` in `If-None-Match` is still that of the image."
        }
    elif method.is_stream:
        (content,) = success["content"].values()
        success["description"] = "One message a line, or one an event where `Accept` asks for events."
        success["content"] = dict.fromkeys(("application/x-ndjson", "text/event-stream"), content)
        if method.resume_field is not None:
            parameters.append(_LAST_EVENT)
            operation["responses"]["204"] = {"description": "As events: none comes after that one."}
    if not method.has_body:
        parameters += [_map(field) for field in method.request.fields if is_map(field)]
    parameters.append(_TIMEOUT)
    problem = {"schema": {"$ref": "#/components/schemas/Problem"}}
    operation["responses"]["default"] = {"description": "A problem.", "content": {PROBLEM_TYPE: problem}}


def _map(field: FieldDescriptor) -> dict[str, Any]:
    """The parameter `NAME[KEY]=VALUE`, which the plugin leaves out."""
    return {
        "name": field.json_name,
        "in": "query",
        "description": f"`{field.json_name}[KEY]=VALUE`, any number of times.",
        "style": "deepObject",
        "schema": {"type": "object", "additionalProperties": _TEXT},
    }


def _fit_bodies(described: dict[str, Any]) -> None:
    """Leave out of bodies what stands in the path, and bodies in which nothing is left."""
    schemas = described["components"]["schemas"]
    for method in http_methods(SERVICE):
        if method.has_body and method.path_fields:
            fields = schemas[method.request.name]["properties"]
            for name in method.path_fields:
                del fields[method.request.fields_by_name[name].json_name]
            if not fields:
                del described["paths"][_json_path(method)][method.verb.lower()]["requestBody"]


def _remove_unused_schemas(described: dict[str, Any]) -> None:
    schemas = described["components"]["schemas"]
    used: set[str] = set()
    waiting = set(_references(described["paths"]))
    while waiting:
        used |= waiting
        waiting = {each for name in waiting for each in _references(schemas[name])} - used
    described["components"]["schemas"] = {name: schemas[name] for name in sorted(used)}


def _references(value: Any) -> Iterator[str]:
    return (match[1] for match in re.finditer(r'"#/components/schemas/(\w+)"', json.dumps(value)))


def _without_indents(value: Any) -> Any:
    """The same, without the space with which every line of a comment begins."""
    if isinstance(value, dict):
        return {name: _without_indents(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_without_indents(each) for each in value]
    return value.replace("\n ", "\n") if isinstance(value, str) else value


def main() -> None:
    """Write the document, or compare it."""
    written = json.dumps(document(), indent=1, ensure_ascii=False) + "\n"
    if sys.argv[1:] == ["--check"]:
        if not DOCUMENT.exists() or DOCUMENT.read_text(encoding="utf-8") != written:
            sys.exit(f"{DOCUMENT.name} is not what the contract says: run scripts/generate")
    else:
        DOCUMENT.write_text(written, encoding="utf-8")


if __name__ == "__main__":
    main()
