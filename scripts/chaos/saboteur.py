"""Kills and stops processes of a service, by a deck of cards that a seed shuffles."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from enum import StrEnum

import psutil

from scripts.chaos.service import Service

MEAN_PAUSE_SECONDS = 2.0
SHORT_PAUSE_SECONDS = 0.5
SHORT_PAUSE_SHARE = 0.3
"""Share of the pauses that are short: the next card then comes while the ranks recover from the last one."""


class Card(StrEnum):
    """One fault that the service suffers."""

    KILL_RANK = "kill a rank"
    KILL_TWO_RANKS = "kill two ranks"
    STOP_RANK = "stop a rank"
    KILL_STORE = "kill the store"
    STOP_STORE = "stop the store"
    KILL_ZYGOTE = "kill the zygote"
    STOP_ZYGOTE = "stop the zygote"


DECK = {
    Card.KILL_RANK: 8,
    Card.KILL_TWO_RANKS: 2,
    Card.STOP_RANK: 3,
    Card.KILL_STORE: 1,
    Card.STOP_STORE: 1,
    Card.KILL_ZYGOTE: 1,
    Card.STOP_ZYGOTE: 1,
}


LEAST = (Card.KILL_RANK, Card.STOP_RANK)
"""Cards that are played at least once, however long it takes: recoveries take longer on a busy machine."""


class Saboteur:
    """Plays cards for a while.

    Args:
        service: whose processes it is.
        seconds: from `start` on, or longer until all of `LEAST` have been played.
        choices: which cards, victims and pauses.
        on_strike: called before each.
    """

    def __init__(
        self, service: Service, seconds: float, choices: random.Random, on_strike: Callable[[], None]
    ) -> None:
        self.played: Counter[Card] = Counter()
        self._service = service
        self._seconds = seconds
        self._choices = choices
        self._on_strike = on_strike
        self._is_stopped = threading.Event()
        self._thread = threading.Thread(target=self._play)

    def start(self) -> None:
        """Begin to play cards."""
        self._thread.start()

    @property
    def is_over(self) -> bool:
        """Whether no card is played any more."""
        return not self._thread.is_alive()

    def stop(self) -> None:
        """End now, after the card that is being played."""
        self._is_stopped.set()
        self._thread.join()

    def _play(self) -> None:
        deck: list[Card] = []
        end = time.monotonic() + self._seconds
        while not self._is_stopped.wait(self._pause_seconds()):
            if time.monotonic() >= end and all(self.played[card] for card in LEAST):
                return
            if not deck:
                deck = [card for card, count in DECK.items() for _ in range(count)]
                self._choices.shuffle(deck)
            if self._strike(deck[-1]):
                self.played[deck.pop()] += 1

    def _pause_seconds(self) -> float:
        if self._choices.random() < SHORT_PAUSE_SHARE:
            return self._choices.uniform(0.0, SHORT_PAUSE_SECONDS)
        return self._choices.uniform(SHORT_PAUSE_SECONDS, 2 * MEAN_PAUSE_SECONDS)

    def _strike(self, card: Card) -> bool:
        """Whether the card's victims were there."""
        victims = self._victims(card)
        if not victims:
            return False
        self._on_strike()
        is_stop = card in (Card.STOP_RANK, Card.STOP_STORE, Card.STOP_ZYGOTE)
        for victim in victims:
            try:
                victim.send_signal(signal.SIGSTOP if is_stop else signal.SIGKILL)
            except psutil.NoSuchProcess:
                return False
        return True

    def _victims(self, card: Card) -> list[psutil.Process]:
        match card:
            case Card.KILL_STORE | Card.STOP_STORE:
                victim = self._service.store()
            case Card.KILL_ZYGOTE | Card.STOP_ZYGOTE:
                victim = self._service.zygote()
            case _:
                ranks = sorted(self._service.ranks().items())
                count = 2 if card is Card.KILL_TWO_RANKS else 1
                if len(ranks) < count:
                    return []
                return [process for _, process in self._choices.sample(ranks, count)]
        return [victim] if victim else []
