"""Kill ranks at random for as long as you like, and see that no request is lost.

Four ranks with the demo model on the CPU (`tp=2,cfg=2`), four callers that always have a request, of mixed
sizes and lengths. Ranks, their zygote and their store are killed and stopped, two at once and while others
recover. Every request must succeed: one that ran alone with the bytes of an undisturbed run, others
within rounding of its pixels. Prints one JSON line; exit code 1 when anything was not as it must be.

    python -m scripts.chaos [--minutes 30] [--seed N] [--log FILE]
"""

from __future__ import annotations

import statistics
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from scripts.bench.report import percentile, report, say
from scripts.chaos.run import run_chaos


def main(
    minutes: Annotated[float, typer.Option(help="how long processes are killed")] = 30.0,
    seed: Annotated[int, typer.Option(help="of what is asked for, which rank is killed, and the pauses")] = 1,
    log: Annotated[Path | None, typer.Option(help="where the service's log goes")] = None,
) -> None:
    """Run the chaos, print what came of it."""
    log_path = log or Path(tempfile.mkdtemp(prefix="hidream-chaos-")) / "service.log"
    say(f"the service's log is {log_path}")
    chaos = run_chaos(seed, minutes * 60, log_path, say)
    for fault in chaos.faults:
        say(fault)
    seconds = chaos.recovery_seconds
    assert chaos.before is not None
    assert chaos.after is not None
    report(
        "chaos",
        seed=seed,
        minutes=minutes,
        requests=chaos.num_requests,
        requests_alone=chaos.num_alone,
        requests_restarted=chaos.num_restarted,
        restarts=chaos.num_restarts,
        strikes={card.value: count for card, count in sorted(chaos.strikes.items())},
        recoveries=len(seconds),
        recovery_median_seconds=round(statistics.median(seconds), 3) if seconds else None,
        recovery_p95_seconds=round(percentile(seconds, 95), 3) if seconds else None,
        generations=chaos.num_generations,
        rank_restarts=chaos.num_rank_restarts,
        lost_steps=chaos.num_steps_lost,
        failures=len(chaos.faults),
        layout=chaos.layout,
        left_processes=chaos.num_left_processes,
        before=asdict(chaos.before),
        after=asdict(chaos.after),
    )
    if chaos.faults or chaos.num_left_processes:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
