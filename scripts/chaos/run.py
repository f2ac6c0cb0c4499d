"""Let callers generate images while ranks die, and count what came of it."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import psutil

from hidream.client import Client
from scripts.chaos.chaos_requests import REQUESTS, Followed, References, follow, pick
from scripts.chaos.recoveries import Recoveries
from scripts.chaos.saboteur import Card, Saboteur
from scripts.chaos.service import STOP_TIMEOUT_SECONDS, Service, running_service

LAYOUT = "tp=2,cfg=2"
NUM_CALLERS = 4
REQUESTS_IN_COMPANY = 8
"""Requests in company between two that run alone."""

QUIET_TIMEOUT_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a service at rest takes.

    Attributes:
        server_memory_bytes: resident.
        num_server_descriptors: open files and sockets of the server.
        num_server_threads: of the server.
        max_rank_descriptors: of the rank that has most.
    """

    server_memory_bytes: int
    num_server_descriptors: int
    num_server_threads: int
    max_rank_descriptors: int


@dataclass
class Chaos:
    """What came of it.

    Attributes:
        num_requests: that ended while ranks died or after.
        num_alone: of those: with no other beside them.
        num_restarted: of those: whose ranks were lost at least once.
        num_restarts: of all requests together.
        num_steps_lost: that callers were told of and that were taken again.
        strikes: by kind.
        recovery_seconds: from a kill to progress; see `Recoveries`.
        num_rank_restarts: rank processes that were started in place of another.
        num_generations: groups that were joined in place of another.
        faults: everything that must not be.
        before, after: the service at rest.
        layout: at the end.
        num_left_processes: of the service, after it has ended.
    """

    num_requests: int = 0
    num_alone: int = 0
    num_restarted: int = 0
    num_restarts: int = 0
    num_steps_lost: int = 0
    strikes: Counter[Card] = field(default_factory=Counter)
    recovery_seconds: list[float] = field(default_factory=list)
    num_rank_restarts: int = 0
    num_generations: int = 0
    faults: list[str] = field(default_factory=list)
    before: Footprint | None = None
    after: Footprint | None = None
    layout: str = ""
    num_left_processes: int = 0


def run_chaos(seed: int, seconds: float, log_path: Path, say: Callable[[str], None]) -> Chaos:
    """Run a service of its own for some seconds of chaos, until all that it was asked for has ended.

    Args:
        seed: decides the requests, which rank is killed and the pauses; moments still vary with the machine.
        seconds: how long processes are killed.
        log_path: where the service's log goes.
        say: is told how far it is.
    """
    chaos = Chaos()
    with running_service(LAYOUT, log_path) as service, Client(service.address) as client:
        references = _references(client)
        chaos.before = _footprint(service)
        _Run(chaos, client, references, random.Random(seed)).disturb(service, seconds, say)
        info = client.info()
        chaos.layout = info.layout
        chaos.num_rank_restarts = info.num_rank_restarts
        chaos.num_generations = info.generation - 1
        chaos.after = _footprint(service, at_most=chaos.before)
    if service.process.returncode != 0:
        chaos.faults.append(f"the server ended with {service.process.returncode}")
    _, left = psutil.wait_procs(service.survivors(), timeout=STOP_TIMEOUT_SECONDS)
    chaos.num_left_processes = len(left)
    return chaos


class _Run:
    """The callers of one run; their threads share it."""

    def __init__(self, chaos: Chaos, client: Client, references: References, choices: random.Random) -> None:
        self._chaos = chaos
        self._client = client
        self._references = references
        self._choices = choices
        self._recoveries = Recoveries()
        self._lock = threading.Lock()

    def disturb(self, service: Service, seconds: float, say: Callable[[str], None]) -> None:
        """Generate images while processes die, then each of them once more."""
        chaos = self._chaos
        saboteur = Saboteur(
            service, seconds, random.Random(self._choices.random()), on_strike=self._recoveries.struck
        )
        saboteur.start()
        try:
            with ThreadPoolExecutor(NUM_CALLERS) as callers:
                while not saboteur.is_over:
                    numbers = [pick(self._choices) for _ in range(REQUESTS_IN_COMPANY)]
                    list(callers.map(lambda number: self._generate(number, was_alone=False), numbers))
                    self._generate(pick(self._choices), was_alone=True)
                    say(
                        f"{chaos.num_requests} requests, {sum(saboteur.played.values())} strikes, "
                        f"{chaos.num_restarts} restarts, {len(chaos.faults)} faults"
                    )
        finally:
            saboteur.stop()
        for number in range(len(REQUESTS)):
            self._generate(number, was_alone=True)
        chaos.strikes = saboteur.played
        chaos.recovery_seconds = self._recoveries.seconds

    def _generate(self, number: int, *, was_alone: bool) -> None:
        followed = follow(self._client, REQUESTS[number], self._recoveries.note)
        faults = followed.faults or self._references.differences(number, followed.images, was_alone=was_alone)
        with self._lock:
            self._count(followed, was_alone=was_alone)
            self._chaos.faults += [f"{datetime.now():%H:%M:%S} {fault}" for fault in faults]

    def _count(self, followed: Followed, *, was_alone: bool) -> None:
        self._chaos.num_requests += 1
        self._chaos.num_alone += was_alone
        self._chaos.num_restarted += followed.num_restarts > 0
        self._chaos.num_restarts += followed.num_restarts
        self._chaos.num_steps_lost += followed.num_steps_lost


def _references(client: Client) -> References:
    images = {}
    for number, request in enumerate(REQUESTS):
        followed = follow(client, request, lambda _event: None)
        if followed.faults:
            raise RuntimeError(f"undisturbed: {followed.faults}")
        images[number] = followed.images
    return References(images)


def _footprint(service: Service, at_most: Footprint | None = None) -> Footprint:
    """What the service takes at rest; waits until its connections of a moment ago are closed."""
    deadline = time.monotonic() + QUIET_TIMEOUT_SECONDS
    while True:
        server = service.process
        footprint = Footprint(
            server_memory_bytes=server.memory_info().rss,
            num_server_descriptors=server.num_fds(),
            num_server_threads=server.num_threads(),
            max_rank_descriptors=_max_rank_descriptors(service),
        )
        is_at_rest = at_most is None or (
            footprint.num_server_descriptors <= at_most.num_server_descriptors
            and footprint.max_rank_descriptors <= at_most.max_rank_descriptors
        )
        if is_at_rest or time.monotonic() > deadline:
            return footprint
        time.sleep(0.1)


def _max_rank_descriptors(service: Service) -> int:
    counts = [0]
    for process in service.ranks().values():
        with suppress(psutil.NoSuchProcess):
            counts.append(process.num_fds())
    return max(counts)
