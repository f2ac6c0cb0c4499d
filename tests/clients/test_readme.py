"""The program in the README draws an image; the Chinese README has the same program."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import PIL.Image

from tests.support.live_server import LiveServer

REPOSITORY = Path(__file__).resolve().parents[2]


def program_of(readme: str) -> str:
    text = (REPOSITORY / readme).read_text(encoding="utf-8")
    (program,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert isinstance(program, str)
    return program


def without_texts(program: str) -> str:
    """The program, whatever its prompt is and whatever it prints."""
    tree = ast.parse(program)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            node.value = ""
        if isinstance(node, ast.JoinedStr):
            node.values = [value for value in node.values if isinstance(value, ast.FormattedValue)]
    return ast.dump(tree)


def test_the_ten_lines_of_the_readme_draw_an_image(server: LiveServer, tmp_path: Path) -> None:
    program = program_of("README.md")
    assert "localhost:8088" in program
    done = subprocess.run(
        [sys.executable, "-c", program.replace("localhost:8088", server.address)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == "step 24 of 24"
    with PIL.Image.open(tmp_path / "circle.png") as image:
        assert image.size == (256, 256)


def test_the_chinese_readme_has_the_same_ten_lines() -> None:
    assert without_texts(program_of("README.zh.md")) == without_texts(program_of("README.md"))
