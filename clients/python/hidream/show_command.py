"""The command that says how an image file was generated."""

from __future__ import annotations

from typing import Annotated

import typer

from hidream.generated_image import GeneratedImage
from hidream.options import AsJson


def show(
    file: Annotated[
        GeneratedImage,
        typer.Argument(
            parser=GeneratedImage.read, metavar="FILE", help="PNG, JPEG or WebP.", show_default=False
        ),
    ],
    as_json: AsJson = False,
) -> None:
    """Print what an image file says of itself: prompt, seed, model; asks no server."""
    typer.echo(file.json() if as_json else file.table())
