"""Figure 8 of the design: what the death of a rank costs a running request.

One caller follows a long request of a running service (demo model, CPU, ranks of one thread). Every ten
steps something is killed: one rank, each in turn, or the zygote, so that the whole group starts anew, with
all its imports. The time from SIGKILL to the next progress event after a rank's death is divided by the time
after the group's; steps that the caller was told of and that are taken again are counted. A replaced rank
loads its share of the weights, which the log says the time of: without it at most 0.1 is the goal. Prints
one JSON line; times are medians over the rounds.

    python -m scripts.bench.recovery [--rounds 6] [--side 128] [--layout cfg=2]
"""

from __future__ import annotations

import re
import statistics
import tempfile
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Annotated

import psutil
import typer

from hidream.client import Client
from hidream.events import Event, Progress, Restarted
from scripts.bench.images import LAYOUT, PROMPT, ImageRequest
from scripts.bench.report import report, say
from scripts.chaos.service import Service, running_service

NUM_STEPS_BETWEEN = 10
MAX_STEPS = 150
"""Steps of one request at most; the next request goes on where it ends."""


def main(
    rounds: Annotated[int, typer.Option(help="times that a rank is killed, and the group")] = 6,
    side: Annotated[int, typer.Option(help="width and height, in pixels")] = 128,
    layout: Annotated[str, typer.Option(help="of the ranks")] = LAYOUT,
) -> None:
    """Kill ranks and groups in turns, print what it cost."""
    request = ImageRequest(side_pixels=side, num_inference_steps=MAX_STEPS)
    rank_seconds: list[float] = []
    rank_load_seconds: list[float] = []
    rank_lost_steps: list[int] = []
    group_seconds: list[float] = []
    group_lost_steps: list[int] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        running_service(layout, Path(folder) / "service.log") as service,
        Client(service.address) as client,
    ):
        events = _events(client, request)
        for number in range(rounds):
            ranks = sorted(service.ranks().items())
            rank, process = ranks[number % len(ranks)]
            seconds, lost = _kill(process, events)
            rank_seconds.append(seconds)
            rank_load_seconds.append(_last_load_seconds(service))
            rank_lost_steps.append(lost)
            zygote = service.zygote()
            assert zygote is not None
            seconds, lost = _kill(zygote, events)
            group_seconds.append(seconds)
            group_lost_steps.append(lost)
            say(
                f"round {number + 1} of {rounds}: rank {rank} {rank_seconds[-1]:.3f} s, of it loading "
                f"{rank_load_seconds[-1]:.3f} s, {rank_lost_steps[-1]} steps lost; "
                f"the group {group_seconds[-1]:.3f} s, {group_lost_steps[-1]} steps lost"
            )
        events.close()
    full_seconds = statistics.median(group_seconds)
    without_load = [all_ - load for all_, load in zip(rank_seconds, rank_load_seconds, strict=True)]
    report(
        "recovery",
        ratio=round(statistics.median(rank_seconds) / full_seconds, 3),
        ratio_without_load=round(statistics.median(without_load) / full_seconds, 3),
        max_lost_steps=max(rank_lost_steps),
        rank_seconds=round(statistics.median(rank_seconds), 3),
        rank_load_seconds=round(statistics.median(rank_load_seconds), 3),
        group_seconds=round(full_seconds, 3),
        group_max_lost_steps=max(group_lost_steps),
        rounds=rounds,
        side_pixels=side,
        layout=layout,
    )


def _events(client: Client, request: ImageRequest) -> Generator[Event]:
    """Yield the events of one request after another, without end."""
    seed = 0
    while True:
        yield from client.generate(PROMPT, **request.options(seed))
        seed += 1


def _kill(process: psutil.Process, events: Iterator[Event]) -> tuple[float, int]:
    """Kill a process in mid-request; returns the seconds until progress, and the steps that were lost."""
    last_step = _go_on(events, NUM_STEPS_BETWEEN)
    process.kill()
    killed = time.perf_counter()
    num_lost_steps, was_restarted = 0, False
    for event in events:
        if isinstance(event, Restarted):
            num_lost_steps, was_restarted = max(0, last_step - event.resumed_from_step), True
        elif isinstance(event, Progress):
            if was_restarted:
                break
            last_step = event.step
    return time.perf_counter() - killed, num_lost_steps


def _go_on(events: Iterator[Event], num_steps: int) -> int:
    """Read some steps of one request, far from its end; returns the last one."""
    steps = 0
    for event in events:
        if isinstance(event, Progress):
            is_near_end = event.total_steps - event.step < NUM_STEPS_BETWEEN
            steps = 0 if is_near_end else steps + 1
            if steps >= num_steps:
                return event.step
    raise RuntimeError("the events ended")


def _last_load_seconds(service: Service) -> float:
    return float(re.findall(r"loaded in (\S+) s", service.log())[-1])


if __name__ == "__main__":
    typer.run(main)
