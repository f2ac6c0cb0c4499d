"""A service with the demo model on ranks of one thread each, and every process of it."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO
from urllib.request import urlopen

import psutil

from hidream.client import Client
from hidream_grpc.model.checkpoint.demo import demo_checkpoint_path

START_TIMEOUT_SECONDS = 120.0
STOP_TIMEOUT_SECONDS = 60.0
NUM_RETAINED_JOBS = 8

_RANK_TITLE = re.compile(r"hidream-grpc rank (\d+)")
_ZYGOTE_TITLE = re.compile(r"hidream-grpc zygote|-m hidream_grpc\.engine\.zygote")
_STORE_TITLE = re.compile(r"hidream-grpc store")


@dataclass
class Service:
    """A running service.

    Attributes:
        process: the server.
        log_path: where its log is.
        address: for clients.
        metrics_port: on the loopback interface.
    """

    process: psutil.Popen
    log_path: Path
    address: str = ""
    metrics_port: int = 0
    _seen: set[psutil.Process] = field(default_factory=set)

    def processes(self) -> list[psutil.Process]:
        """The children that live now: zygote, store and ranks."""
        try:
            children: list[psutil.Process] = self.process.children(recursive=True)
        except psutil.NoSuchProcess:
            children = []
        self._seen.update(children)
        return children

    def ranks(self) -> dict[int, psutil.Process]:
        """The rank processes that live now, by rank."""
        return {
            int(match[1]): process
            for process in self.processes()
            if (match := _RANK_TITLE.search(_title(process)))
        }

    def zygote(self) -> psutil.Process | None:
        """The ranks' parent, if it lives."""
        return self._titled(_ZYGOTE_TITLE)

    def store(self) -> psutil.Process | None:
        """The host of torch's store, if it lives."""
        return self._titled(_STORE_TITLE)

    def survivors(self) -> list[psutil.Process]:
        """All processes that were ever seen and still live."""
        return [process for process in self._seen if _lives(process)]

    def metric(self, name: str) -> float:
        """A metric without labels, now."""
        with urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        match = re.search(rf"^{name} (\S+)$", text, re.MULTILINE)
        if match is None:
            raise ValueError(f"no metric {name}")
        return float(match[1])

    def log(self) -> str:
        """All that it has logged."""
        return self.log_path.read_text(encoding="utf-8")

    def _titled(self, title: re.Pattern[str]) -> psutil.Process | None:
        return next((process for process in self.processes() if title.search(_title(process))), None)


@contextmanager
def running_service(layout: str, log_path: Path) -> Iterator[Service]:
    """The service in this layout on the CPU, once it serves; it ends with SIGTERM."""
    with (
        TemporaryDirectory(prefix="hidream-chaos-") as data_dir,
        _running(layout, log_path, data_dir) as service,
    ):
        yield service


@contextmanager
def _running(layout: str, log_path: Path, data_dir: str) -> Iterator[Service]:
    command = [sys.executable, "-m", "hidream_grpc", "serve"]
    where = ["--listen", "127.0.0.1:0", "--metrics-port", "0", "--data-dir", data_dir]
    model = ["--model-path", str(demo_checkpoint_path()), "--max-retained-jobs", str(NUM_RETAINED_JOBS)]
    ranks = ["--device-type", "cpu", "--layout", layout, "--threads-per-rank", "1"]
    process = psutil.Popen([*command, *where, *model, *ranks], stderr=subprocess.PIPE, text=True)
    service = Service(process, log_path)
    is_listening = threading.Event()
    reader = threading.Thread(target=_keep_log, args=(process.stderr, service, is_listening))
    reader.start()
    try:
        if not is_listening.wait(START_TIMEOUT_SECONDS) or not service.address:
            raise RuntimeError(f"the service did not start: {log_path}")
        with Client(service.address) as client:
            client.wait_until_serving(START_TIMEOUT_SECONDS)
        yield service
    finally:
        service.processes()
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_SECONDS)
        finally:
            if process.poll() is None:
                process.kill()
            reader.join(STOP_TIMEOUT_SECONDS)
            process.stderr.close()


def _keep_log(lines: IO[str], service: Service, is_listening: threading.Event) -> None:
    with service.log_path.open("w", encoding="utf-8", buffering=1) as log:
        for line in lines:
            log.write(line)
            if match := re.search(r"metrics on port (\d+)", line):
                service.metrics_port = int(match[1])
            if match := re.search(r"listening on (\S+:\d+)", line):
                service.address = match[1]
                is_listening.set()
    is_listening.set()


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
