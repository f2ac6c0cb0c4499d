"""The wall clock of one server, which the test steps (`tests/support/faults/stepped_clock.py`)."""

from __future__ import annotations

import os
import struct
from pathlib import Path

FAULTS_FOLDER = Path(__file__).parents[1] / "support" / "faults"


class SteppedClock:
    """A clock that shows the machine's time until it is stepped.

    Args:
        path: of a new file, which the server maps.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("wb+", buffering=0)
        self.step_to(0.0)

    @property
    def environment(self) -> dict[str, str]:
        """Variables of a server that is to have this clock."""
        folders = [str(FAULTS_FOLDER), *filter(None, [os.environ.get("PYTHONPATH")])]
        return {"PYTHONPATH": os.pathsep.join(folders), "STEPPED_CLOCK": str(self._path)}

    def step_to(self, seconds: float) -> None:
        """Show so many seconds more than the machine does, from now on; fewer where negative."""
        os.pwrite(self._file.fileno(), struct.pack("d", seconds), 0)

    def close(self) -> None:
        """Close the file; the server keeps the clock as it is."""
        self._file.close()
