from __future__ import annotations

import re
import subprocess
import sys
from importlib import metadata

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


def test_installing_the_client_installs_no_torch() -> None:
    needed: set[str] = set()
    waiting = ["hidream-client"]
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
