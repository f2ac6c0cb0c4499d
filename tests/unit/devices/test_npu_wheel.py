"""Everything that devices/npu.py asks of torch_npu is in the pinned wheel, which is read, not imported.

The wheel is downloaded once into .cache/wheels of the repository and taken from there afterwards.
It is always the one for CPython 3.11 on x86-64: its Python sources are the same on every platform.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from zipfile import ZipFile

import pytest

from tests.unit.devices.npu_stand_in import NpuRuntime

REPOSITORY = Path(__file__).parents[3]
NPU_MODULE = REPOSITORY / "hidream_grpc" / "devices" / "npu.py"
WHEEL_CACHE = REPOSITORY / ".cache" / "wheels"


def pinned_requirement() -> str:
    """`torch_npu==<version>`, from the extra that installs it."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (requirement,) = (item for item in project["optional-dependencies"]["npu"] if "torch_npu==" in item)
    return str(requirement)


@pytest.fixture(scope="session")
def torch_npu_wheel() -> Path:
    requirement = pinned_requirement()
    pattern = f"torch_npu-{requirement.partition('==')[2]}-cp311-*x86_64.whl"
    WHEEL_CACHE.mkdir(parents=True, exist_ok=True)
    if not any(WHEEL_CACHE.glob(pattern)):
        # Only a whole file gets its name in the cache.
        with tempfile.TemporaryDirectory(dir=WHEEL_CACHE) as download_directory:
            download = [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--quiet",
                "--no-deps",
                "--only-binary=:all:",
            ]
            download += ["--python-version=3.11", "--platform=manylinux_2_28_x86_64"]
            download += [f"--dest={download_directory}", requirement]
            subprocess.run(download, check=True)
            (wheel,) = Path(download_directory).glob(pattern)
            wheel.replace(WHEEL_CACHE / wheel.name)
    return next(WHEEL_CACHE.glob(pattern))


class PackageSource:
    """The Python sources of one package in a wheel: which names its modules define."""

    def __init__(self, wheel: Path) -> None:
        with ZipFile(wheel) as archive:
            self._sources = {name: archive.read(name) for name in archive.namelist() if name.endswith(".py")}
        self._parsed = cache(self._parse)

    def find(self, dotted_name: str) -> ast.AST | None:
        """The module, or the statement that defines a name such as `torch_npu.npu.synchronize`."""
        module_name, _, name = dotted_name.rpartition(".")
        return (
            self._parsed(dotted_name)
            or self._find_in_module(module_name, name)
            or self._find_operator(dotted_name)
        )

    def _find_operator(self, dotted_name: str) -> ast.AST | None:
        """An operator of the compiled library, by the signature that its documentation begins with."""
        documentation = self._sources["torch_npu/_op_plugin_docs.py"].decode()
        name = dotted_name.removeprefix("torch_npu.")
        signature = re.search(rf"^(?:torch_npu\.)?{re.escape(name)}\((.*)\) -> ", documentation, re.MULTILINE)
        if signature is None:
            return None
        parameters = []
        for parameter in signature[1].split(", "):
            declared, _, default = parameter.partition("=")
            is_optional = bool(default) or "?" in declared
            parameters.append(declared.split()[-1] + ("=None" if is_optional else ""))
        (definition,) = ast.parse(f"def {name}({', '.join(parameters)}): ...").body
        return definition

    def _find_in_module(self, module_name: str, name: str) -> ast.AST | None:
        module = self._parsed(module_name)
        if module is None:
            return None
        # The last definition of a name is the one that stands.
        for statement in reversed(module.body):
            if isinstance(statement, ast.FunctionDef | ast.ClassDef) and statement.name == name:
                return statement
            if isinstance(statement, ast.Assign) and name in map(ast.unparse, statement.targets):
                return statement
            if isinstance(statement, ast.ImportFrom):
                found = self._find_in_import(module_name, statement, name)
                if found is not None:
                    return found
        return None

    def _find_in_import(self, module_name: str, statement: ast.ImportFrom, name: str) -> ast.AST | None:
        source = statement.module or ""
        if statement.level == 1:  # these imports stand in __init__.py files
            source = f"{module_name}.{source}"
        for alias in statement.names:
            if alias.name == "*" and name in self._exported(source):
                return self._find_in_module(source, name)
            if (alias.asname or alias.name) == name:
                return self.find(f"{source}.{alias.name}")
        return None

    def _exported(self, module_name: str) -> set[str]:
        module = self._parsed(module_name)
        for statement in module.body if module else ():
            if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "__all__":
                return set(ast.literal_eval(statement.value))
        return set()

    def _parse(self, module_name: str) -> ast.Module | None:
        path = module_name.replace(".", "/")
        source = self._sources.get(f"{path}/__init__.py") or self._sources.get(f"{path}.py")
        return ast.parse(source) if source else None


@pytest.fixture(scope="session")
def torch_npu_source(torch_npu_wheel: Path) -> PackageSource:
    return PackageSource(torch_npu_wheel)


def torch_npu_name(node: ast.AST) -> str | None:
    """`torch_npu.a.b` if the node is that chain of attributes."""
    if isinstance(node, ast.Name | ast.Attribute):
        name = ast.unparse(node)
        if name == "torch_npu" or name.startswith("torch_npu."):
            return name
    return None


def uses_of_torch_npu() -> Iterator[tuple[str, ast.Call | None]]:
    """Every torch_npu name in devices/npu.py, with the call if it is called."""
    tree = ast.parse(NPU_MODULE.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "torch_npu":
            yield from ((f"{node.module}.{alias.name}", None) for alias in node.names)
        name = torch_npu_name(node.func if isinstance(node, ast.Call) else node)
        if name is not None:
            yield name, node if isinstance(node, ast.Call) else None


def accepts(function: ast.FunctionDef, call: ast.Call) -> bool:
    """Whether the function takes the call's arguments, counted and named."""
    arguments = function.args
    names = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)]
    given = set(names[: len(call.args)]) | {keyword.arg for keyword in call.keywords}
    required = set(names[: len(names) - len(arguments.defaults)])
    known = {*names, *(argument.arg for argument in arguments.kwonlyargs)}
    return len(call.args) <= len(names) and required <= given <= known


def test_every_torch_npu_name_that_we_use_is_in_the_pinned_wheel(torch_npu_source: PackageSource) -> None:
    names = {name for name, _ in uses_of_torch_npu()}
    assert "torch_npu.npu.set_device" in names
    assert [name for name in sorted(names) if torch_npu_source.find(name) is None] == []


def test_every_torch_npu_function_takes_the_arguments_that_we_give_it(
    torch_npu_source: PackageSource,
) -> None:
    calls = [(name, call) for name, call in uses_of_torch_npu() if call is not None]
    assert len(calls) >= 5
    for name, call in calls:
        function = torch_npu_source.find(name)
        assert isinstance(function, ast.FunctionDef), name
        assert accepts(function, call), ast.unparse(call)


def test_a_name_that_the_wheel_does_not_have_is_noticed(torch_npu_source: PackageSource) -> None:
    assert torch_npu_source.find("torch_npu.npu.memory_of_device") is None
    assert torch_npu_source.find("torch_npu.cuda.synchronize") is None
    assert torch_npu_source.find("torch_npu.npu_fused_attention") is None
    synchronize = torch_npu_source.find("torch_npu.npu.synchronize")
    assert isinstance(synchronize, ast.FunctionDef)
    for call, expected in (("f()", True), ("f(d)", True), ("f(d, e)", False), ("f(stream=s)", False)):
        (statement,) = ast.parse(call).body
        assert isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call)
        assert accepts(synchronize, statement.value) is expected, call


def test_the_stand_in_offers_nothing_that_the_wheel_lacks(torch_npu_source: PackageSource) -> None:
    offered = [name for name in vars(NpuRuntime) if not name.startswith("_")]
    assert offered
    assert [name for name in offered if torch_npu_source.find(f"torch_npu.npu.{name}") is None] == []
