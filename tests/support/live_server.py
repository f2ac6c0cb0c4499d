"""Starts the real server as a process of its own, waits for it, and ends it by its process id."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import grpc
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc

from hidream.v1 import image_gen_pb2, image_gen_pb2_grpc, server_info_pb2

_LISTENING = re.compile(r"listening on (\S+:\d+)")
_METRICS = re.compile(r"metrics on port (\d+)")
START_TIMEOUT_SECONDS = 120.0
# Longer than the default grace, which jobs use up where the cores are busy.
STOP_TIMEOUT_SECONDS = 120.0
DRAIN_SECONDS = 2.0
HEALTH_TIMEOUT_SECONDS = 30.0
# Threads of one rank spin while they wait for each other: with two of them a step beside busy cores takes ten
# times as long as with one.
ONE_THREAD_PER_RANK = ("--threads-per-rank", "1")
# Two ranks take as long for a step of so small a model, and twice the cores.
ONE_RANK = ("--devices", "0")


def wait_until(condition: Callable[[], bool], timeout_seconds: float, what: str) -> None:
    """Return once the condition holds; fail when it does not in time."""
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_seconds:g} s: {what}")
        # What is asked of a server costs it milliseconds.
        time.sleep(0.03)


def wait_until_serving(address: str) -> None:
    """Follow grpc.health.v1 until the service takes requests."""
    with grpc.insecure_channel(address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(
            health_pb2.HealthCheckRequest(service="hidream.v1.ImageGen"), timeout=START_TIMEOUT_SECONDS
        )
        for response in watch:
            if response.status == health_pb2.HealthCheckResponse.SERVING:
                watch.cancel()
                return


def check_health(address: str, service: str) -> health_pb2.HealthCheckResponse.ServingStatus:
    """What grpc.health.v1 says of a service now."""
    with grpc.insecure_channel(address) as channel:
        request = health_pb2.HealthCheckRequest(service=service)
        return health_pb2_grpc.HealthStub(channel).Check(request).status


@dataclass
class LiveServer:
    """A running server: its process, its address, and what it has logged."""

    process: subprocess.Popen[str]
    log_lines: list[str] = field(default_factory=list)
    address: str = ""

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def log(self) -> str:
        return "".join(self.log_lines)

    @property
    def metrics_port(self) -> int:
        match = _METRICS.search(self.log)
        assert match is not None, "the server was started without --metrics-port"
        return int(match[1])

    @contextmanager
    def stub(self) -> Iterator[image_gen_pb2_grpc.ImageGenStub]:
        """A plain generated stub on a channel with default options."""
        with grpc.insecure_channel(self.address) as channel:
            yield image_gen_pb2_grpc.ImageGenStub(channel)

    def info(self) -> server_info_pb2.ServerInfo:
        with self.stub() as stub:
            return stub.GetServerInfo(image_gen_pb2.GetServerInfoRequest())

    def logged_lines(self, *texts: str, after: int = 0) -> list[str]:
        """The lines that hold all of these texts, once there is one: lines come after what they tell.

        Args:
            texts: in any order.
            after: this many lines of the log, which are passed over.
        """

        def lines() -> list[str]:
            return [line for line in self.log_lines[after:] if all(text in line for text in texts)]

        wait_until(lambda: bool(lines()), 10, f"a line of the log holds {texts}")
        return lines()

    def wait_until_serving(self) -> None:
        wait_until_serving(self.address)

    def wait_until_idle(self) -> None:
        """Wait until no job is queued or running."""
        wait_until(
            lambda: (jobs := self.info().jobs).queued == jobs.running == 0, 60, "no job is queued or running"
        )

    def descendants(self) -> list[psutil.Process]:
        """Zygote, store and ranks."""
        return psutil.Process(self.pid).children(recursive=True)

    def rank_pids(self) -> list[int]:
        """The rank processes, by rank, from the log of the newest start of each."""
        pids: dict[int, int] = {}
        for match in re.finditer(r"rank (\d+) is process (\d+)", self.log):
            pids[int(match[1])] = int(match[2])
        return [pids[rank] for rank in sorted(pids)]


def _read_log(server: LiveServer, has_address: threading.Event) -> None:
    assert server.process.stderr is not None
    for line in server.process.stderr:
        server.log_lines.append(line)
        if not server.address and (match := _LISTENING.search(line)):
            server.address = match[1]
            has_address.set()
    has_address.set()


def _end(process: subprocess.Popen[str]) -> None:
    """Have a server end in order; what a test has left running is not waited for."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(DRAIN_SECONDS)
    except subprocess.TimeoutExpired:
        # The second signal ends the grace period.
        process.send_signal(signal.SIGTERM)
        process.wait(STOP_TIMEOUT_SECONDS)


@contextmanager
def running_server(
    *flags: str, wait: bool = True, environment: Mapping[str, str] | None = None
) -> Iterator[LiveServer]:
    """The server with these flags on a free port of 127.0.0.1; it ends with SIGTERM.

    Args:
        flags: of `hidream-grpc serve`; one rank of one thread unless they say otherwise.
        wait: until it serves; otherwise only until it listens.
        environment: variables of the server besides those of the test.
    """
    with tempfile.TemporaryDirectory(prefix="hidream-test-") as folder:
        own_folder = () if "--data-dir" in flags else ("--data-dir", folder)
        threads = () if "--threads-per-rank" in flags else ONE_THREAD_PER_RANK
        ranks = () if {"--devices", "-d", "--layout"} & set(flags) else ONE_RANK
        words = ("--listen", "127.0.0.1:0", *own_folder, *ranks, *threads, *flags)
        with _running_server(words, wait, {**os.environ, **(environment or {})}) as server:
            yield server


@contextmanager
def _running_server(flags: tuple[str, ...], wait: bool, environment: dict[str, str]) -> Iterator[LiveServer]:
    command = [sys.executable, "-m", "hidream_grpc", "serve", *flags]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    server = LiveServer(process)
    has_address = threading.Event()
    reader = threading.Thread(target=_read_log, args=(server, has_address))
    reader.start()
    try:
        assert has_address.wait(START_TIMEOUT_SECONDS), "the server does not listen"
        assert server.address, f"the server has ended:\n{server.log}"
        if wait:
            server.wait_until_serving()
        yield server
    finally:
        try:
            _end(process)
        finally:
            process.kill()
            process.wait()
            reader.join(STOP_TIMEOUT_SECONDS)
            assert process.stderr is not None
            process.stderr.close()


@contextmanager
def watched_health(
    server: LiveServer,
) -> Iterator[Callable[[], health_pb2.HealthCheckResponse.ServingStatus]]:
    """A function that waits for the next change of the readiness."""
    with grpc.insecure_channel(server.address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(
            health_pb2.HealthCheckRequest(service="hidream.v1.ImageGen"), timeout=HEALTH_TIMEOUT_SECONDS
        )
        yield lambda: next(watch).status
        watch.cancel()
