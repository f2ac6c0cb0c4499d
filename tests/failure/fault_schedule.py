"""What fails when: pauses, cuts, delays, wrong clocks and lost images, shuffled by a seed."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tests.failure.artifact_folder import ArtifactFolder
from tests.failure.bucket_proxy import BucketProxy
from tests.failure.faulty_servers import LEASE_SECONDS, FaultyServer

SMALL_STEPS_SECONDS = (-30.0, 0.0, 30.0)
LARGE_STEPS_SECONDS = (*SMALL_STEPS_SECONDS, -3700.0, 3700.0)
"""The faults of replicas, which have the database's clock besides; a server alone has only its own."""
QUIET_SECONDS = (0.2, 1.5)
"""Between two faults; the second of a pair comes while the first lasts."""
PAIR_SHARE = 0.25


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that fails for a while.

    Attributes:
        seconds: how long at least, and at most.
        begin, end: make it so, and undo it.
    """

    name: str
    seconds: tuple[float, float]
    begin: Callable[[random.Random], None]
    end: Callable[[], None]


def server_faults(server: FaultyServer) -> list[Fault]:
    """What can befall one server and its way to the database."""
    faults = [
        _pause("a short pause", server, (0.3, 1.5)),
        _pause("a pause longer than the lease", server, (1.5 * LEASE_SECONDS, 2.5 * LEASE_SECONDS)),
        Fault("a wrong clock", (0.5, 3.0), lambda choices: _step(server, choices), lambda: None),
    ]
    if (proxy := server.proxy) is not None:
        heal = proxy.heal
        faults += [
            Fault("a cut store", (0.3, 2.0), lambda _: proxy.cut(), heal),
            Fault("a silent store", (0.5, 2.0 * LEASE_SECONDS), lambda _: proxy.silence(), heal),
            Fault("a slow store", (1.0, 4.0), lambda choices: _slow(server, choices), heal),
        ]
    return faults


def folder_faults(folder: ArtifactFolder) -> list[Fault]:
    """What can befall the images of all servers."""
    return [Fault("a lost image folder", (0.3, 2.0), lambda _: folder.fail(), folder.heal)]


def bucket_faults(bucket: BucketProxy) -> list[Fault]:
    """What can befall the images in a bucket."""
    return [
        Fault("a slow bucket", (2.0, 5.0), lambda _: bucket.delay_puts(1.5), bucket.heal),
        Fault("a bucket that answers 503", (0.3, 2.0), lambda _: bucket.refuse(), bucket.heal),
        Fault("a silent bucket", (0.5, 4.0), lambda _: bucket.silence(), bucket.heal),
    ]


def _pause(name: str, server: FaultyServer, seconds: tuple[float, float]) -> Fault:
    return Fault(name, seconds, lambda _: server.pause(), server.wake)


def _step(server: FaultyServer, choices: random.Random) -> None:
    steps = SMALL_STEPS_SECONDS if server.proxy is None else LARGE_STEPS_SECONDS
    server.clock.step_to(choices.choice(steps))


def _slow(server: FaultyServer, choices: random.Random) -> None:
    seconds = choices.uniform(0.02, 0.2)
    to_upstream = choices.random() < 0.5
    server.store.delay(
        to_upstream_seconds=seconds if to_upstream else 0.0,
        to_server_seconds=0.0 if to_upstream else seconds,
    )


class FaultSchedule:
    """Plays faults in a thread for a while, one or two at a time, of different victims.

    Args:
        faults: by victim.
        seed: of which, when, and for how long.
        kinds: the names of those to play; all when empty.
    """

    def __init__(
        self, faults: Mapping[str, Sequence[Fault]], seed: str, seconds: float, kinds: Sequence[str] = ()
    ) -> None:
        self.played: Counter[str] = Counter()
        self._faults = {
            victim: [fault for fault in each if not kinds or fault.name in kinds]
            for victim, each in faults.items()
        }
        self._choices = random.Random(seed)
        self._seconds = seconds
        self._is_stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="faults")
        self._error: Exception | None = None

    def start(self) -> None:
        """Begin the fault."""
        self._thread.start()

    def wait(self) -> None:
        """Return when the time is over, and everything is undone; raises what a fault has raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """Play nothing more; everything is undone when this returns."""
        self._is_stopped.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            self._play()
        except Exception as error:
            self._error = error

    def _play(self) -> None:
        end_time = time.monotonic() + self._seconds
        deck: list[tuple[str, Fault]] = []
        while time.monotonic() < end_time and not self._is_stopped.is_set():
            if not deck:
                # Each once, before any comes again.
                deck = [(victim, fault) for victim, faults in self._faults.items() for fault in faults]
                self._choices.shuffle(deck)
            victim, fault = deck.pop()
            together = [fault]
            if deck and deck[-1][0] != victim and self._choices.random() < PAIR_SHARE:
                together.append(deck.pop()[1])
            self._play_together(together)
            self._is_stopped.wait(self._choices.uniform(*QUIET_SECONDS))

    def _play_together(self, faults: Sequence[Fault]) -> None:
        begun: list[Fault] = []
        try:
            for fault in faults:
                fault.begin(self._choices)
                begun.append(fault)
                self.played[fault.name] += 1
                self._is_stopped.wait(self._choices.uniform(*fault.seconds) / len(faults))
        finally:
            for fault in begun:
                fault.end()
