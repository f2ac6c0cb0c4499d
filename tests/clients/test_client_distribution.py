from __future__ import annotations

import logging
import re
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import hidream
from tests.clients.conftest import PROJECT

HEAVY = {"torch", "diffusers", "transformers", "accelerate", "numpy", "PIL", "hidream_grpc"}

IMPORT_EVERYTHING = """
import importlib, pkgutil, sys
import hidream
for module in pkgutil.walk_packages(hidream.__path__, "hidream."):
    importlib.import_module(module.name)
print(*(name for name in sys.modules if "." not in name))
"""


def test_no_module_of_the_client_imports_torch() -> None:
    imported = subprocess.run(
        [sys.executable, "-c", IMPORT_EVERYTHING], stdout=subprocess.PIPE, text=True, check=True
    ).stdout.split()
    assert "hidream" in imported
    assert not HEAVY.intersection(imported)


def test_the_package_itself_names_what_a_first_program_needs() -> None:
    # In a process of its own, where nothing has imported the parts.
    program = "import hidream; print(hidream.Client.__name__, hidream.AsyncClient.__name__)"
    program += "; from hidream import *; print(Client is hidream.client.Client)"
    answer = subprocess.run(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=True
    ).stdout
    assert answer.splitlines() == ["Client AsyncClient", "True"]
    with pytest.raises(AttributeError, match="no attribute 'Clint'"):
        hidream.Clint  # noqa: B018


def test_the_wheel_of_the_client_has_its_version_its_licence_and_its_types(tmp_path: Path) -> None:
    build = "import sys; from hatchling.build import build_wheel; build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, tmp_path], cwd=PROJECT / "clients" / "python", check=True)
    [wheel] = tmp_path.iterdir()
    info = f"hidream_client-{hidream.__version__}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        licence = archive.read(f"{info}/licenses/LICENSE")
        assert {"hidream/py.typed", "hidream/__main__.py"} <= set(archive.namelist())
    assert licence == (PROJECT / "LICENSE").read_bytes()


def test_the_log_of_the_client_says_nothing_until_a_program_asks_for_it() -> None:
    handlers = logging.getLogger("hidream").handlers
    assert [type(handler) for handler in handlers] == [logging.NullHandler]


@pytest.mark.parametrize("distribution", ["hidream-client", "hidream-http"])
def test_installing_the_client_or_the_bridge_installs_no_torch(distribution: str) -> None:
    needed: set[str] = set()
    waiting = [distribution]
    while waiting:
        name = waiting.pop()
        if name in needed:
            continue
        needed.add(name)
        for requirement in metadata.requires(name) or ():
            # What belongs to an extra or to another system is not installed here.
            if ";" not in requirement and (match := re.match(r"[\w.-]+", requirement)):
                waiting.append(match[0].lower().replace("_", "-"))
    assert "grpcio" in needed
    assert not HEAVY.intersection(needed)
