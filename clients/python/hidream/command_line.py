"""What every command has: a connection, and what a shell sees when something goes wrong."""

from __future__ import annotations

import functools
import inspect
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Concatenate

import typer
from typer.core import TyperGroup
from typer.exceptions import TyperException

from hidream.batch_lines import InvalidLinesError
from hidream.client import Client
from hidream.connection import DEFAULT_ADDRESS, Tls
from hidream.errors import (
    AddressError,
    HiDreamError,
    InternalError,
    InvalidArgumentError,
    NotServingError,
    ResourceExhaustedError,
    ServerError,
    UnavailableError,
)
from hidream.options import VARIABLES, Address, CaFile, CertFile, KeyFile, Token, UseTls
from hidream.progress import ProgressBar, ProgressLines
from hidream.reconnecting import ReconnectPolicy

EXIT_FAILED = 1
EXIT_INVALID = 2
EXIT_UNAVAILABLE = 3
EXIT_INTERRUPTED = 130

_ARGUMENTS = {
    "spec.prompt": "PROMPT",
    "spec.negative_prompt": "--negative",
    "spec.width": "--size",
    "spec.height": "--size",
    "spec.num_inference_steps": "--steps",
    "spec.guidance_scale": "--guidance",
    "spec.num_images": "--images",
    "spec.seed": "--seed",
    "spec.output_format": "--format",
    "spec.quality": "--quality",
    "request_id": "--request-id",
    "priority": "--priority",
    "labels": "--label",
    "model": "--model",
    "page_size": "--page-size",
    "page_token": "--page-token",
    "job_id": "JOB_ID",
    "image_index": "--index",
}


def connected(command: Callable[Concatenate[Client, ...], None]) -> Callable[..., None]:
    """Return the command as typer runs it: with the options of a connection behind its own.

    Args:
        command: what to do with a client of the server that those options describe; its errors end
            the process with their lines and exit code. One that has `going_on` gets what goes on with it.
    """
    _, *own = inspect.signature(command, eval_str=True).parameters.values()
    shown = [parameter for parameter in own if parameter.name != "going_on"]
    of_connection = inspect.signature(_new_client, eval_str=True).parameters

    @functools.wraps(command)
    def run(**options: Any) -> None:
        connection = {name: options.pop(name) for name in of_connection}
        _refuse_empty(connection)
        going_on = GoingOn.after(command.__name__, options, connection)
        if len(shown) < len(own):
            options["going_on"] = going_on
        with exit_codes(connection["address"], going_on), _new_client(**connection) as client:
            command(client, **options)

    # What typer reads.
    run.__signature__ = inspect.Signature([*shown, *of_connection.values()])  # type: ignore[attr-defined]
    return run


def _refuse_empty(connection: Mapping[str, Any]) -> None:
    """End the command where an option of the connection, or the variable in its place, is empty.

    An unset `$TOKEN` or `$TLS` of a script must not become a call without a token, or in plaintext.
    """
    for name, variable in VARIABLES.items():
        value = connection[name]
        if not os.environ.get(variable, variable).strip():
            # Typer takes it for an absent one.
            empty = variable
        elif isinstance(value, str) and not value.strip():
            empty = "--" + name.replace("_", "-")
        else:
            continue
        typer.echo(f"hidream: {empty}: is empty; leave it out to have its default", err=True)
        raise typer.Exit(EXIT_INVALID)


def _new_client(
    address: Address = DEFAULT_ADDRESS,
    token: Token = None,
    tls: UseTls = False,
    ca_file: CaFile = None,
    cert_file: CertFile = None,
    key_file: KeyFile = None,
) -> Client:
    if (cert_file is None) != (key_file is None):
        raise typer.BadParameter("a certificate and its key are given together", param_hint="--cert-file")
    authorities = _pem(ca_file, "--ca-file", "CERTIFICATE")
    certificate = _pem(cert_file, "--cert-file", "CERTIFICATE")
    key = _pem(key_file, "--key-file", "PRIVATE KEY")
    has_tls = tls or authorities or certificate
    return Client(address, token=token, tls=Tls(authorities, key, certificate) if has_tls else None)


def _pem(path: Path | None, option: str, kind: str) -> bytes | None:
    """Return what a file holds; BadParameter where gRPC would only say that it could not connect."""
    if path is None:
        return None
    try:
        data = path.read_bytes()
    except OSError as error:
        raise typer.BadParameter(f"{path}: {error.strerror}", param_hint=option) from None
    if f"{kind}-----".encode() not in data:
        raise typer.BadParameter(f"{path} holds no {kind.lower()} in PEM", param_hint=option)
    return data


class CommandGroup(TyperGroup):
    """The commands, whose usage errors are one line."""

    def main(self, args: Sequence[str] | None = None, *rest: Any, **options: Any) -> Any:
        """Run a command and end the process with its exit code."""
        try:
            code = super().main(args, *rest, **{**options, "standalone_mode": False})
        except TyperException as error:
            message = " ".join(error.format_message().split()).removesuffix(".")
            context = getattr(error, "ctx", None)
            where = f"; see '{context.command_path} --help'" if context else ""
            typer.echo(f"hidream: {message}{where}", err=True)
            code = error.exit_code
        sys.exit(code)


def reconnect_policy(
    timeout_seconds: float | None,
    reconnect_seconds: float,
    display: ProgressBar | ProgressLines,
    going_on: GoingOn,
) -> ReconnectPolicy:
    """How a command follows a job, and says when the connection is lost, and which command goes on."""
    return ReconnectPolicy(
        timeout_seconds,
        reconnect_seconds,
        lambda error: display.show_connection_lost(
            going_on.after_loss(error) if error.followed_job_id else str(error)
        ),
    )


@dataclass(frozen=True, slots=True)
class GoingOn:
    """The command that goes on with the job of another one that has lost its server.

    Attributes:
        command: its name.
        options: its options, as words of a command line.
    """

    command: str
    options: tuple[str, ...]

    @classmethod
    def after(cls, command: str, options: Mapping[str, Any], connection: Mapping[str, Any]) -> GoingOn:
        """The command behind another one: `generate` without `--out` writes into the working folder."""
        out = options.get("out") or ("." if command == "generate" else None)
        address = connection["address"]
        kept = {
            "out": out,
            "index": options.get("index"),
            **connection,
            "address": None if address == DEFAULT_ADDRESS else address,
            # Other users of the machine see a command line, and a log keeps it.
            "token": None if connection["token"] is None or VARIABLES["token"] in os.environ else "TOKEN",
        }
        return cls("download" if command == "download" else "watch", tuple(_words(kept)))

    def line(self, job_id: str) -> str:
        """Return the command for a shell, with a job that goes on by itself."""
        return f"to go on with job {job_id}: {shlex.join(['hidream', self.command, job_id, *self.options])}"

    def after_loss(self, error: ServerError) -> str:
        """Say how to go on with the job that was being followed when the connection was lost."""
        if not error.followed_request_id:
            return self.line(error.followed_job_id)
        when = f"after {error.held_seconds:g} s " if error.held_seconds else ""
        return (
            f"to go on with job {error.followed_job_id}: the same command with "
            f"--request-id {error.followed_request_id} ({when}it may start anew)"
        )


def _words(options: Mapping[str, Any]) -> Iterator[str]:
    for name, value in options.items():
        option = "--" + name.replace("_", "-")
        if value is True:
            yield option
        elif value not in (None, False):
            for one in value if isinstance(value, list) else [value]:
                yield from (option, str(one))


@contextmanager
def exit_codes(address: str, going_on: GoingOn) -> Iterator[None]:
    """Let an error end the command, with its lines on stderr and its exit code."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("hidream: interrupted", err=True)
        raise typer.Exit(EXIT_INTERRUPTED) from None
    except HiDreamError as error:
        for line in error_lines(error, address, going_on):
            typer.echo(f"hidream: {line}", err=True)
        raise typer.Exit(exit_code(error)) from None
    except BrokenPipeError:
        # Whoever reads stdout has seen enough; `main` ends quietly.
        raise
    except OSError as error:
        typer.echo(f"hidream: {error}", err=True)
        raise typer.Exit(EXIT_FAILED) from None


def exit_code(error: HiDreamError) -> int:
    """The exit code that the command's help promises for an error."""
    match error:
        case InvalidArgumentError() | InvalidLinesError() | AddressError():
            return EXIT_INVALID
        case UnavailableError() | ResourceExhaustedError() | NotServingError():
            return EXIT_UNAVAILABLE
        case _:
            return EXIT_FAILED


def error_lines(error: HiDreamError, address: str, going_on: GoingOn | None = None) -> list[str]:
    """What the command says of an error: a line for each bad argument, or one line."""
    if isinstance(error, InvalidArgumentError) and error.violations:
        return [
            f"{_ARGUMENTS.get(violation.field, 'the request')} ({violation.field}): {violation.description}"
            for violation in error.violations
        ]
    if isinstance(error, InvalidLinesError):
        return [
            f"line {violation.line_number}, {violation.field}: {violation.description}"
            if violation.field
            else f"line {violation.line_number}: {violation.description}"
            for violation in error.violations
        ]
    if isinstance(error, AddressError):
        return [str(error)]
    if going_on and isinstance(error, ServerError) and error.followed_job_id:
        return [f"{address}: {error.message}; {going_on.after_loss(error)}"]
    line = f"{address}: {error}"
    if isinstance(error, InternalError) and error.error_id not in str(error):
        line += f" (error id {error.error_id})"
    if isinstance(error, ServerError) and error.retry_after_seconds is not None:
        line += f"; try again in {error.retry_after_seconds:g} s"
    return [line]
