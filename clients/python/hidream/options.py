"""Arguments and options that several commands take."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, cast

import typer

from hidream.requests import JobStateName, Priority


@dataclass(frozen=True, slots=True)
class Size:
    """Width and height of an image, in pixels."""

    width: int | None = None
    height: int | None = None

    @classmethod
    def parse(cls, text: str) -> Size:
        """The size that `WIDTHxHEIGHT` says, with an x of any kind."""
        width, _, height = text.lower().replace("×", "x").partition("x")
        if not (width.isdecimal() and height.isdecimal()):
            raise typer.BadParameter(f"{text!r} is not WIDTHxHEIGHT in pixels, such as 512x768")
        return cls(int(width), int(height))


class PriorityName(StrEnum):
    """Priorities, as a command line names them."""

    LOW = "low"
    NORMAL = "normal"
    HIGH = "high"


class State(StrEnum):
    """States of jobs, as a command line names them."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Label:
    """One label of a job."""

    key: str
    value: str

    @classmethod
    def parse(cls, text: str) -> Label:
        """The label that `KEY=VALUE` says."""
        key, separator, value = text.partition("=")
        if not separator or not key:
            raise typer.BadParameter(f"{text!r} is not KEY=VALUE")
        return cls(key, value)


# How to reach the server.
VARIABLES = {
    "address": "HIDREAM_ADDRESS",
    "token": "HIDREAM_TOKEN",
    "tls": "HIDREAM_TLS",
    "ca_file": "HIDREAM_CA_FILE",
    "cert_file": "HIDREAM_CERT_FILE",
    "key_file": "HIDREAM_KEY_FILE",
}
Address = Annotated[
    str,
    typer.Option(
        envvar=VARIABLES["address"], help="Of the server: host, host:port, or a URL with http:// or https://."
    ),
]
Token = Annotated[
    str | None,
    typer.Option(envvar=VARIABLES["token"], show_envvar=True, help="Bearer token; better by its variable."),
]
UseTls = Annotated[bool, typer.Option("--tls", envvar=VARIABLES["tls"], help="Encrypt the connection.")]
CaFile = Annotated[
    Path | None,
    typer.Option(
        envvar=VARIABLES["ca_file"],
        help="PEM file of the authorities that vouch for the server, in place of the public ones.",
    ),
]
CertFile = Annotated[
    Path | None,
    typer.Option(
        envvar=VARIABLES["cert_file"],
        help="PEM file that proves who calls, for servers that ask for it, with --key-file.",
    ),
]
KeyFile = Annotated[
    Path | None, typer.Option(envvar=VARIABLES["key_file"], help="PEM file with the key of --cert-file.")
]

# What to draw.
Prompt = Annotated[str, typer.Argument(help="What to draw.", show_default=False)]
Seed = Annotated[int | None, typer.Option(help="Seed of the first image. Default: a random one.")]
SizeOption = Annotated[
    Size | None, typer.Option(parser=Size.parse, metavar="WIDTHxHEIGHT", help="In pixels.")
]
Steps = Annotated[int | None, typer.Option(help="Denoising steps.")]
Guidance = Annotated[
    float | None, typer.Option(help="How closely to follow the prompt; 1 or less is not at all.")
]
Negative = Annotated[str | None, typer.Option(help="What to keep away from.")]
Images = Annotated[int | None, typer.Option(help="How many images; each is drawn from the next seed.")]
Quality = Annotated[int | None, typer.Option(help="Quality of JPEG and WebP, 1 to 100.")]
Model = Annotated[
    str | None, typer.Option(help="Which model draws, one that `hidream info` names. Default: the server's.")
]
PriorityOption = Annotated[PriorityName | None, typer.Option("--priority", help="Which jobs go first.")]
JobLabels = Annotated[
    list[Label] | None,
    typer.Option("--label", parser=Label.parse, metavar="KEY=VALUE", help="To find it again; several times."),
]
RequestId = Annotated[
    str | None, typer.Option(help="A name for the request, so that a retry does not draw twice.")
]

# Which jobs.
_JOB_ID_HELP = "Id, or its beginning, as `list` prints it."
JobId = Annotated[str, typer.Argument(metavar="JOB_ID", help=_JOB_ID_HELP, show_default=False)]
JobIds = Annotated[list[str], typer.Argument(metavar="JOB_ID...", help=_JOB_ID_HELP, show_default=False)]
States = Annotated[
    list[State] | None,
    typer.Option("--state", help="Only jobs in this state; several times: in any of them."),
]
Labels = Annotated[
    list[Label] | None,
    typer.Option(
        "--label",
        parser=Label.parse,
        metavar="KEY=VALUE",
        help="Only jobs with it; several times: with all of them.",
    ),
]

# How long to wait, and what to print.
Timeout = Annotated[float, typer.Option(help="Give up after this many seconds.")]
NoTimeout = Annotated[float | None, typer.Option(help="Give up after this many seconds. Default: never.")]
Reconnect = Annotated[
    float, typer.Option(help="When the connection is lost, try again for this many seconds.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print paths and errors only.")]
AsJson = Annotated[bool, typer.Option("--json", help="Everything, as JSON.")]
EventsAsJson = Annotated[bool, typer.Option("--json", help="Every event, as a line of JSON.")]


def priority_name(priority: PriorityName | None) -> Priority | None:
    """Return the priority that was named, as a request names it."""
    return None if priority is None else cast(Priority, priority.name)


def state_names(states: Iterable[State] | None) -> list[JobStateName]:
    """The states that were named, as a request names them."""
    return [cast(JobStateName, state.name) for state in states or ()]


def labels_by_key(labels: Iterable[Label] | None) -> dict[str, str]:
    """Return the labels that were given; the last one counts where several have the same key."""
    return {label.key: label.value for label in labels or ()}
