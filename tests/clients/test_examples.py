"""The programs of examples/, as they stand there, against the live service."""

from __future__ import annotations

import ast
import json
import runpy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
from google.protobuf.message import Message

from hidream import requests
from hidream.images import Image
from tests.support.live_server import LiveServer

EXAMPLES = Path(__file__).parents[2] / "examples"
FILES = {
    "one_image.py": {"one_image.png"},
    "progress_and_preview.py": {"star.png", "star_preview.jpg"},
    "batch.py": {"red.png", "blue.png"},
    "cancel_async.py": {"ring.png"},
    "notebook.ipynb": {"notebook.png"},
}


@pytest.fixture(autouse=True)
def folder(server: LiveServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where an example works, with the server that it asks."""
    monkeypatch.setenv("HIDREAM_ADDRESS", server.address)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def _small_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an example leaves to the server, its size and its steps, is small."""
    small = {"width": 64, "height": 64, "num_inference_steps": 4}
    fill = requests._filled

    def filled(request: Message, arguments: Mapping[str, Any]) -> Message:
        left_out = {name: value for name, value in small.items() if arguments.get(name, "unknown") is None}
        return fill(request, {**arguments, **left_out})

    monkeypatch.setattr(requests, "_filled", filled)


def shown_by_cells(notebook: Path) -> list[Any]:
    """Run the cells of a notebook one after another, and return the value of each that ends with one."""
    values, names = [], {"__name__": "__main__"}
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] != "code":
            continue
        body = ast.parse("".join(cell["source"]))
        last = body.body.pop() if isinstance(body.body[-1], ast.Expr) else None
        exec(compile(body, str(notebook), "exec"), names)
        if isinstance(last, ast.Expr):
            values.append(eval(compile(ast.Expression(last.value), str(notebook), "eval"), names))
    return values


def test_every_example_is_run() -> None:
    assert set(FILES) == {path.name for path in EXAMPLES.iterdir()} - {"README.md"}


@pytest.mark.parametrize("name", FILES)
def test_an_example_writes_its_images(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if name.endswith(".ipynb"):
        shown = [value for value in shown_by_cells(EXAMPLES / name) if isinstance(value, Image)]
        assert [bool(image._repr_png_()) for image in shown] == [True, False]
        assert shown[1]._repr_jpeg_()
    else:
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        assert capsys.readouterr().out
    assert {path.name for path in folder.iterdir()} == FILES[name]
    for path in folder.iterdir():
        with PIL.Image.open(path) as picture:
            picture.load()
