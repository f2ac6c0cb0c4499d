from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from hidream.v1 import image_gen_pb2_grpc
from tests.support.live_server import LiveServer, running_server
from tests.support.postgres import PostgresServer, running_postgres
from tests.support.warm_zygotes.starts import start_warm

UNIT_TESTS = Path(__file__).parent / "unit"

# The many objects of the libraries and of the collected tests are no garbage: they are not searched for it.
gc.disable()

# Servers that tests break on purpose are no news.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
# On shared cores an example that took long says nothing.
settings.register_profile("shared cores", deadline=None)
settings.load_profile("shared cores")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="run the tests marked long too")
    group = parser.getgroup("promises", "the failure harness, tests/failure/test_promises.py")
    group.addoption("--promise-minutes", type=float, help="how long things fail in each run")
    group.addoption("--promise-seed", default="1", help="of what fails, and of what callers do")
    group.addoption("--promise-fault", action="append", default=[], help="a fault to play, or all of them")


def pytest_configure(config: pytest.Config) -> None:
    # With --long every zygote is a new interpreter, as in operation.
    if not config.getoption("--long"):
        config.add_cleanup(start_warm())


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--long"):
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("long")])
        items[:] = [item for item in items if not item.get_closest_marker("long")]
    # The many short files of tests/unit last: they let the workers end at about the same time.
    items.sort(key=lambda item: item.path.is_relative_to(UNIT_TESTS))


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def is_long(request: pytest.FixtureRequest) -> bool:
    """Whether what takes long is to run too: all cases, sizes and attempts."""
    return bool(request.config.getoption("--long"))


@pytest.fixture(scope="session")
def server(is_long: bool) -> Iterator[LiveServer]:
    """One server with the demo model for all tests that leave it as they found it.

    With `--long` it has two ranks.
    """
    devices = "0,1" if is_long else "0"
    # All readers of a test come from one host, and are one caller.
    flags = ("--max-streams-per-caller", "1000", "--grace-seconds", "5")
    trusted = ("--trusted-proxies", "127.0.0.1", "--trusted-bridges", "127.0.0.1")
    with running_server("--devices", devices, "--metrics-port", "0", *flags, *trusted) as live:
        yield live


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """One PostgreSQL for all tests that leave it running; each takes a database of its own."""
    with running_postgres() as database_server:
        yield database_server


@pytest.fixture
def stub(server: LiveServer) -> Iterator[image_gen_pb2_grpc.ImageGenStub]:
    """A plain generated stub of the shared server."""
    with server.stub() as stub:
        yield stub
