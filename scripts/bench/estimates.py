"""What a refresh of the estimates costs the event loop: CPU time, with 16 running and 64 waiting jobs.

The jobs differ in size, steps, number of images and caller. The baseline is the round of the scheduler
that the engine does for every step of the same running jobs. Prints one JSON line.

    python -m scripts.bench.estimates [--refreshes 200]
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from typing import Annotated

import typer

from hidream_grpc.engine.requests import StepReport
from hidream_grpc.engine.scheduler import next_forward, note_forward
from hidream_grpc.jobs.estimates.durations import MeasuredDurations
from hidream_grpc.jobs.estimates.simulation import EngineCapacity, JobWork, estimate_jobs
from hidream_grpc.model.parameters import GenerationParameters
from scripts.bench.report import report

NUM_RUNNING = 16
NUM_WAITING = 64
NUM_CALLERS = 8
MAX_STEP_PIXELS = 4 * 1024 * 1024
CAPACITY = EngineCapacity(NUM_RUNNING, MAX_STEP_PIXELS, num_ranks=4)


def main(
    refreshes: Annotated[int, typer.Option(help="times that the estimates are made")] = 200,
    seed: Annotated[int, typer.Option(help="of the jobs")] = 1,
) -> None:
    """Measure refreshes in turns with rounds of the scheduler."""
    jobs = [_job(number, random.Random(seed + number)) for number in range(NUM_RUNNING + NUM_WAITING)]
    durations = MeasuredDurations()
    for side in (512, 768, 1024):
        durations.note_step(StepReport(0.3 * side * side / 1024**2, side, side, num_samples=2))
    running, waiting = jobs[:NUM_RUNNING], jobs[NUM_RUNNING:]
    requests = {work.job_id: work.running_request() for work in running}

    def schedule_round() -> None:
        note_forward(requests, next_forward(requests, MAX_STEP_PIXELS).claim_ids, 0.3)

    refresh_ms, round_ms = [], []
    for _ in range(refreshes):
        refresh_ms.append(_cpu_ms(lambda: estimate_jobs(durations, CAPACITY, running, waiting)))
        round_ms.append(_cpu_ms(schedule_round))
    refresh, baseline = statistics.median(refresh_ms), statistics.median(round_ms)
    report(
        "estimates",
        refresh_cpu_ms=round(refresh, 3),
        scheduler_round_cpu_ms=round(baseline, 4),
        ratio=round(refresh / baseline, 1),
        refreshes=refreshes,
        running_jobs=NUM_RUNNING,
        waiting_jobs=NUM_WAITING,
    )


def _job(number: int, choices: random.Random) -> JobWork:
    side, num_steps = choices.choice([512, 768, 1024]), choices.choice([16, 28, 50])
    parameters = GenerationParameters(
        prompt="",
        negative_prompt="",
        width=side,
        height=side,
        num_inference_steps=num_steps,
        guidance_scale=5.0,
        num_images=choices.choice([1, 1, 2, 4]),
        seed=number,
    )
    step = choices.randrange(num_steps) if number < NUM_RUNNING else 0
    return JobWork(str(number), f"caller {number % NUM_CALLERS}", parameters, step=step)


def _cpu_ms(work: Callable[[], object]) -> float:
    start = time.thread_time()
    work()
    return 1000 * (time.thread_time() - start)


if __name__ == "__main__":
    typer.run(main)
