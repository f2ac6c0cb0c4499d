"""What installing the bridge brings, and what it does not."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import hidream_http

PROJECT = Path(__file__).parents[2]
IMPORTED = "import sys, hidream_http.command; print(*(name for name in sys.modules if '.' not in name))"


def test_the_wheel_of_the_bridge_has_its_licence_its_page_and_its_description(tmp_path: Path) -> None:
    build = "import sys; from hatchling.build import build_wheel; build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, tmp_path], cwd=PROJECT / "clients" / "http", check=True)
    [wheel] = tmp_path.iterdir()
    info = f"hidream_http-{hidream_http.__version__}.dist-info"
    package = PROJECT / "clients" / "http" / "hidream_http"
    files = {
        path.relative_to(package.parent).as_posix()
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(wheel) as archive:
        assert files <= set(archive.namelist())
        assert archive.read(f"{info}/licenses/LICENSE") == (PROJECT / "LICENSE").read_bytes()
        assert "hidream-http = hidream_http.command:main" in archive.read(f"{info}/entry_points.txt").decode()


def test_the_bridge_starts_without_torch_and_without_the_server() -> None:
    modules = subprocess.run(
        [sys.executable, "-c", IMPORTED], stdout=subprocess.PIPE, text=True, check=True
    ).stdout.split()
    assert "hidream_http" in modules
    assert not {"torch", "numpy", "hidream_grpc"}.intersection(modules)
