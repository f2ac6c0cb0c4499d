from __future__ import annotations

import pytest

from tests.clients.conftest import PROJECT, GoTools, run_script

# The first run builds the Go programs.
pytestmark = pytest.mark.timeout(900)


def test_the_go_clients_own_tests_pass(go_tools: GoTools) -> None:
    # Without vet, which analyses every library for its facts: scripts/check runs it.
    command = ("go.sh", "-C", str(PROJECT / "clients" / "go"), "test", "-vet=off", "./...")
    result = run_script(*command)
    assert result.returncode == 0, result.stdout
    assert "ok  \tgithub.com/hidream-grpc/hidream-grpc/clients/go/hidream" in result.stdout
