"""The server's own command with a probe in its event loop: how late the loop is, and what kept it.

    python -m scripts.bench.probed_server FILE serve [FLAGS]

It measures from each SIGUSR1 to the next SIGUSR2, and then appends a line of JSON to the file.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

from hidream_grpc import cli
from hidream_grpc.server.app import serve
from hidream_grpc.settings import Settings
from scripts.bench.report import percentile

INTERVAL_SECONDS = 0.005


class LoopProbe:
    """Samples the lag of a timer, and the CPU time of each turn of the loop: no timer is served within one.

    On a machine that is busy with other work the lag is the machine's too; the CPU time is the loop's alone.
    """

    def __init__(self, loop: Any) -> None:
        self._loop = loop
        self._lags: list[float] = []
        self._turns: list[float] = []
        self._longest_turn = 0.0
        self._sampling: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Sample until the report."""
        run_once = self._loop._run_once

        def measured() -> None:
            start = time.thread_time()
            run_once()
            self._longest_turn = max(self._longest_turn, time.thread_time() - start)

        self._loop._run_once = measured
        self._sampling = asyncio.create_task(self._sample())

    async def _sample(self) -> None:
        while True:
            due = time.perf_counter() + INTERVAL_SECONDS
            await asyncio.sleep(INTERVAL_SECONDS)
            self._lags.append(max(0.0, time.perf_counter() - due))
            self._turns.append(self._longest_turn)
            self._longest_turn = 0.0

    def report(self, path: Path) -> None:
        """Append what was measured since the start, in milliseconds, and stop."""
        if self._sampling is not None:
            self._sampling.cancel()
            del self._loop._run_once
        samples = {"lag": self._lags or [0.0], "turn_cpu": self._turns or [0.0]}
        figures = {
            f"{name}_{label}_ms": round(1e3 * percentile(values, percent), 2)
            for name, values in samples.items()
            for label, percent in (("p50", 50), ("p99", 99), ("max", 100))
        }
        with path.open("a") as file:
            file.write(json.dumps(figures) + "\n")
        self._lags, self._turns, self._longest_turn = [], [], 0.0


def main() -> None:
    """Run the command that follows the file."""
    path = Path(sys.argv.pop(1))

    async def probed(settings: Settings) -> None:
        loop = asyncio.get_running_loop()
        probe = LoopProbe(loop)
        loop.add_signal_handler(signal.SIGUSR1, probe.start)
        loop.add_signal_handler(signal.SIGUSR2, probe.report, path)
        await serve(settings)

    vars(cli)["serve"] = probed
    cli.run_command()


if __name__ == "__main__":
    main()
