"""Jobs on the engine in made-up time, in the order of the queue: groups after groups, and none held up."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hidream_grpc.engine.requests import Priority
from hidream_grpc.engine.running_request import RunningRequest
from hidream_grpc.engine.scheduler import next_forward, note_forward
from hidream_grpc.engine.step_order import MAX_TURNS_WAITED
from hidream_grpc.jobs.estimates.simulation import JobWork
from hidream_grpc.jobs.store.order import TURNS_PER_OLDEST, CallerLoads, WaitingJob, claim_order
from hidream_grpc.jobs.store.step_room import MAX_CONSIDERED_JOBS, StepDemand, StepRoom
from hidream_grpc.model.parameters import GenerationParameters

IMAGE = 1024 * 1024
BUDGET = 4 * 2 * IMAGE
LOW, NORMAL, HIGH = Priority


@dataclass
class Turns:
    """A queue and an engine that take turns: in each the jobs start that may, and one forward follows.

    Attributes:
        turn: forwards so far.
        arrivals: job ids in the order of their acceptance.
        starts: job ids in the order of their starts.
        num_older: jobs that waited when a job was accepted.
        started_beside: jobs that started while as many ran as may and one that was due waited.
        first_steps, ends: of jobs, in turns.
        num_steps: that each caller's jobs have taken.
    """

    max_running_jobs: int = 16
    turn: int = 0
    arrivals: list[str] = field(default_factory=list)
    starts: list[str] = field(default_factory=list)
    num_older: dict[str, int] = field(default_factory=dict)
    first_steps: dict[str, int] = field(default_factory=dict)
    ends: dict[str, int] = field(default_factory=dict)
    num_steps: dict[str, int] = field(default_factory=dict)
    waiting: dict[str, JobWork] = field(default_factory=dict)
    running: dict[str, RunningRequest] = field(default_factory=dict)
    last_turns: dict[str, int] = field(default_factory=dict)
    newest_start: int = -1
    started_beside: set[str] = field(default_factory=set)

    def accept(self, work: JobWork) -> None:
        self.arrivals.append(work.job_id)
        self.num_older[work.job_id] = len(self.waiting)
        self.waiting[work.job_id] = work

    def run(self, num_turns: int | None = None) -> None:
        """So many turns, or until all has ended."""
        last_turn = None if num_turns is None else self.turn + num_turns
        while self.turn != last_turn and (self.waiting or self.running):
            self.take_turn()

    def take_turn(self) -> None:
        while self._start():
            pass
        forward = next_forward(self.running, BUDGET)
        # Work is never left lying.
        assert forward.claim_ids
        note_forward(self.running, forward.claim_ids, 1.0)
        self.turn += 1
        for job_id in forward.claim_ids:
            request = self.running[job_id]
            caller = request.request.caller
            self.num_steps[caller] = self.num_steps.get(caller, 0) + 1
            self.first_steps.setdefault(job_id, self.turn)
            if request.is_denoised:
                self.ends[job_id] = self.turn
                del self.running[job_id]

    def _start(self) -> bool:
        """What a claim does (`jobs/store/claims.py`)."""
        order = claim_order(
            [
                WaitingJob(self.arrivals.index(work.job_id), work.job_id, work.caller, work.priority)
                for work in self.waiting.values()
            ],
            CallerLoads(self.last_turns, newest_start=self.newest_start),
        )
        running = (
            StepDemand.of(r.request.caller, r.request.priority, r.request.parameters, r.step)
            for r in self.running.values()
        )
        room = StepRoom(running, self.max_running_jobs, BUDGET)
        num_started, has_passed_over, is_due_held_back = 0, False, False
        next_turn = order.next_turn
        for job in order.claimable[:MAX_CONSIDERED_JOBS]:
            work = self.waiting[job.job_id]
            is_due = job.job_id in order.due and not has_passed_over
            takes_turn = not is_due_held_back
            if has_passed_over and takes_turn and num_started and next_turn % TURNS_PER_OLDEST == 0:
                break
            if not room.take(work.demand, is_due):
                has_passed_over = True
                is_due_held_back |= is_due
                continue
            num_started += 1
            if takes_turn:
                self.last_turns[job.caller] = next_turn
                next_turn += 1
            else:
                self.started_beside.add(job.job_id)
            self.starts.append(job.job_id)
            self.newest_start = max(self.newest_start, job.acceptance_number)
            self.running[job.job_id] = self.waiting.pop(job.job_id).running_request()
        return bool(num_started)

    def num_later_started_before(self, job_id: str) -> int:
        """Jobs that were accepted later than this one and have started before it in turns of their own."""
        accepted = self.arrivals.index(job_id)
        started = self.starts[: self.starts.index(job_id)] if job_id in self.starts else self.starts
        return sum(
            self.arrivals.index(other) > accepted and other not in self.started_beside for other in started
        )


def guided(
    name: str,
    caller: str = "caller",
    priority: Priority = NORMAL,
    num_steps: int = 50,
    side: int = 1024,
) -> JobWork:
    parameters = GenerationParameters(
        prompt="", width=side, height=side, num_inference_steps=num_steps, guidance_scale=5.0, seed=0
    )
    return JobWork(name, caller, parameters, priority=priority)


@pytest.mark.parametrize("num_callers", [1, 16])
def test_equal_jobs_end_one_group_after_another(num_callers: int) -> None:
    turns = Turns()
    for number in range(16):
        turns.accept(guided(f"job {number}", caller=f"caller {number % num_callers}"))
    turns.run()
    assert sorted(turns.ends.values()) == [50] * 4 + [100] * 4 + [150] * 4 + [200] * 4
    assert fmean(turns.ends.values()) == 125


@pytest.mark.parametrize("priority", [NORMAL, HIGH])
def test_a_job_of_higher_priority_has_its_first_step_next_whatever_runs(priority: Priority) -> None:
    turns = Turns(max_running_jobs=4)
    for number in range(8):
        turns.accept(guided(f"low {number}", priority=LOW))
    turns.run(5)
    turns.accept(guided("urgent", priority=priority, side=512))
    turns.run(1)
    assert turns.first_steps["urgent"] == 6
    turns.run()
    # What it came before keeps its steps.
    assert max(turns.ends.values()) <= 100 + 50 + 1


def test_a_short_job_is_not_held_up_by_long_ones_that_fill_the_steps() -> None:
    turns = Turns()
    for number in range(8):
        turns.accept(guided(f"long {number}", caller=f"caller {number}"))
    turns.run(10)
    turns.accept(guided("short", caller="another", num_steps=4))
    turns.run()
    assert turns.first_steps["short"] <= 12
    assert turns.ends["short"] <= 10 + 2 * 4


def test_a_caller_that_comes_later_gets_its_share_of_the_steps_at_once() -> None:
    turns = Turns()
    for number in range(16):
        turns.accept(guided(f"greedy {number}", caller="greedy"))
    turns.run(10)
    for number in range(4):
        turns.accept(guided(f"modest {number}", caller="modest"))
    before = turns.num_steps["greedy"]
    turns.run(20)
    assert turns.num_steps["modest"] == turns.num_steps["greedy"] - before == 40


def test_a_low_job_starts_after_a_bounded_number_of_later_ones_and_goes_on() -> None:
    turns = Turns()
    turns.accept(guided("first"))
    turns.run(1)
    turns.accept(guided("low", priority=LOW))
    for number in range(400):
        turns.accept(guided(f"normal {number}", num_steps=10))
        if number % 4 == 3:
            turns.run(10)
    assert "low" in turns.starts
    assert turns.num_later_started_before("low") <= TURNS_PER_OLDEST
    assert turns.ends["low"] <= 50 * (MAX_TURNS_WAITED + 1) + 10 * TURNS_PER_OLDEST


@dataclass(frozen=True)
class Arrival:
    after_turns: int
    caller: str
    priority: Priority
    side: int
    num_steps: int


ARRIVALS = st.lists(
    st.builds(
        Arrival,
        st.sampled_from([0, 0, 1, 5]),
        st.sampled_from("aab"),
        st.sampled_from(list(Priority)),
        st.sampled_from([512, 1024, 2048]),
        st.integers(1, 12),
    ),
    min_size=1,
    max_size=40,
)


def run_all(arrivals: Sequence[Arrival]) -> Turns:
    turns = Turns(max_running_jobs=8)
    coming = deque(enumerate(arrivals))
    while coming:
        number, arrival = coming.popleft()
        turns.run(arrival.after_turns)
        turns.accept(guided(str(number), arrival.caller, arrival.priority, arrival.num_steps, arrival.side))
    turns.run()
    return turns


@given(ARRIVALS)
def test_every_job_ends_and_starts_after_a_bounded_number_of_later_ones(arrivals: list[Arrival]) -> None:
    turns = run_all(arrivals)
    assert turns.ends.keys() == set(turns.arrivals)
    for job_id in turns.arrivals:
        num_turns = turns.num_older[job_id] + 1
        assert turns.num_later_started_before(job_id) <= num_turns * TURNS_PER_OLDEST
