"""A real Chromium: what `scripts/install_chromium.sh` has unpacked."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Browser, sync_playwright

FOLDER = Path(__file__).parents[2] / ".cache" / "chromium"
PROGRAM = FOLDER / "usr" / "lib" / "chromium" / "chromium"
# Small pages on few cores: no process for drawing, one for all tabs, and nothing that asks the network.
FLAGS = (
    "--disable-gpu",
    "--disable-software-rasterizer",
    "--disable-background-networking",
    "--renderer-process-limit=1",
)


@contextmanager
def running_chromium() -> Iterator[Browser]:
    """A browser without windows; the calls of its library must come from this thread."""
    if not PROGRAM.exists():
        missing = "there is no Chromium: scripts/install_chromium.sh"
        pytest.fail(missing) if os.environ.get("CI") else pytest.skip(missing)
    libraries = sorted({str(path.parent) for path in (FOLDER / "usr/lib").rglob("*.so*")})
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=PROGRAM,
            args=FLAGS,
            env={**os.environ, "LD_LIBRARY_PATH": ":".join(libraries)},
        )
        try:
            yield browser
        finally:
            browser.close()
