"""The programs of the README and of docs/clients.md that CI can run generate their image."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hidream.client import Client
from tests.clients.conftest import PROJECT, SMALL, STEPS, GoTools, changed, run_script, small_node_program
from tests.support.live_server import LiveServer

# The first run builds the Go programs and installs the packages of Node.
pytestmark = pytest.mark.timeout(900)

PAGE = "docs/clients.md"
ADDRESS = "localhost:8088"


def program_of(page: str, language: str = "python") -> str:
    text = (PROJECT / page).read_text(encoding="utf-8")
    (program,) = re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
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


@pytest.fixture(scope="module")
def circle(server: LiveServer) -> bytes:
    """The image that every one of the programs asks for."""
    with Client(server.address) as client:
        [image] = client.draw("a red circle on a blue background", seed=7, **SMALL)
    return image.data


def check_program(folder: Path, circle: bytes, *command: str | Path) -> None:
    """Run a program in a folder: it tells its steps, and writes the image there."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == f"step {STEPS} of {STEPS}"
    assert (folder / "circle.png").read_bytes() == circle


def test_the_ten_lines_of_the_readme_generate_an_image(
    server: LiveServer, circle: bytes, tmp_path: Path
) -> None:
    program = changed(program_of("README.md"), ADDRESS, server.address)
    small = ", ".join(f"{name}={value}" for name, value in SMALL.items())
    program = changed(program, "seed=7", f"seed=7, {small}")
    check_program(tmp_path, circle, sys.executable, "-c", program)


@pytest.mark.parametrize("page", ["README.zh.md", PAGE])
def test_other_pages_have_the_same_ten_lines(page: str) -> None:
    assert without_texts(program_of(page)) == without_texts(program_of("README.md"))


def test_the_node_program_generates_an_image(
    server: LiveServer, circle: bytes, node_example: Path, tmp_path: Path
) -> None:
    program = small_node_program(node_example, tmp_path)
    check_program(tmp_path, circle, "node", program, server.address)


def test_the_page_shows_the_node_program() -> None:
    assert program_of(PAGE, "js") == (PROJECT / "clients" / "node" / "generate.mjs").read_text()


def test_the_go_program_of_the_page_generates_an_image(
    server: LiveServer, circle: bytes, go_tools: GoTools, tmp_path: Path
) -> None:
    source, binary = tmp_path / "main.go", tmp_path / "circle"
    program = changed(program_of(PAGE, "go"), ADDRESS, server.address)
    small = f"side, steps := int32(64), int32({STEPS})"
    fields = "spec.Width, spec.Height, spec.NumInferenceSteps = &side, &side, &steps"
    source.write_text(changed(program, "\trequest :=", f"\t{small}\n\t{fields}\n\trequest :="))
    module = PROJECT / "clients" / "go"
    flags = ("-trimpath", "-ldflags=-s -w", "-o", str(binary))
    built = run_script("go.sh", "-C", str(module), "build", *flags, str(source))
    assert built.returncode == 0, built.stdout
    check_program(tmp_path, circle, binary)
