from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hidream_grpc.jobs.job import Priority
from hidream_grpc.jobs.queue import JobQueue

Entry = tuple[Priority, str]

entries = st.lists(st.tuples(st.sampled_from(Priority), st.sampled_from("abc")), max_size=40)


def filled(waiting: list[Entry]) -> tuple[JobQueue, dict[str, Entry]]:
    """A queue with these jobs, and what each is; the names say in which order they came."""
    queue = JobQueue()
    jobs = {f"{number:03}": entry for number, entry in enumerate(waiting)}
    for job_id, (priority, caller) in jobs.items():
        queue.push(job_id, priority, caller)
    return queue, jobs


def drained(queue: JobQueue) -> list[str]:
    popped = []
    while (job_id := queue.pop()) is not None:
        popped.append(job_id)
    return popped


def test_a_batch_of_a_hundred_does_not_keep_anothers_single_job_waiting() -> None:
    queue, jobs = filled([(Priority.NORMAL, "batch")] * 100 + [(Priority.NORMAL, "single")])
    callers = [jobs[job_id][1] for job_id in drained(queue)]
    assert callers[:3] == ["batch", "single", "batch"]


def test_a_caller_who_was_served_goes_behind_those_who_wait() -> None:
    queue, jobs = filled([(Priority.NORMAL, "a")] * 3 + [(Priority.NORMAL, "b")] * 2)
    assert queue.pop() == "000"
    queue.push("late", Priority.NORMAL, "c")
    assert [jobs.get(job_id, (0, "c"))[1] for job_id in drained(queue)] == ["b", "a", "c", "b", "a"]


@given(entries)
def test_the_order_told_is_the_order_in_which_jobs_are_taken(waiting: list[Entry]) -> None:
    queue, _ = filled(waiting)
    told = queue.order()
    assert told == drained(queue)


@given(entries)
def test_higher_priorities_always_go_first(waiting: list[Entry]) -> None:
    queue, jobs = filled(waiting)
    priorities = [jobs[job_id][0] for job_id in drained(queue)]
    assert priorities == sorted(priorities, reverse=True)


@given(entries)
def test_a_caller_gets_its_jobs_of_one_priority_in_the_order_in_which_they_came(waiting: list[Entry]) -> None:
    queue, jobs = filled(waiting)
    taken = drained(queue)
    for entry in set(jobs.values()):
        own = [job_id for job_id in taken if jobs[job_id] == entry]
        assert own == sorted(own)


@given(entries)
def test_no_caller_gets_a_second_turn_while_another_waits_for_its_first(waiting: list[Entry]) -> None:
    queue, jobs = filled(waiting)
    taken = drained(queue)
    for priority in Priority:
        callers = [jobs[job_id][1] for job_id in taken if jobs[job_id][0] is priority]
        num_turns = dict.fromkeys(callers, 0)
        left = {caller: callers.count(caller) for caller in num_turns}
        for caller in callers:
            num_turns[caller] += 1
            left[caller] -= 1
            waiting_turns = [num_turns[other] for other in left if left[other] > 0]
            assert all(num_turns[caller] - turns <= 1 for turns in waiting_turns)


@given(entries, st.randoms(use_true_random=False))
def test_a_job_that_is_removed_is_never_taken_and_every_other_one_is(
    waiting: list[Entry],
    random: st.randoms,  # type: ignore[valid-type]
) -> None:
    queue, jobs = filled(waiting)
    removed = {job_id for job_id in jobs if random.random() < 0.4}  # type: ignore[attr-defined]
    assert all(queue.remove(job_id) for job_id in removed)
    assert len(queue) == len(jobs) - len(removed)
    taken = drained(queue)
    assert sorted(taken) == sorted(set(jobs) - removed)


def test_removing_a_job_that_does_not_wait_changes_nothing() -> None:
    queue, _ = filled([(Priority.HIGH, "a")])
    assert not queue.remove("unknown")
    taken = queue.pop()
    assert taken is not None
    assert not queue.remove(taken)
    assert len(queue) == 0
    assert queue.pop() is None


def test_a_caller_of_whom_none_may_start_is_passed_over_and_keeps_its_turn() -> None:
    queue, jobs = filled([(Priority.HIGH, "a"), (Priority.NORMAL, "a"), (Priority.NORMAL, "b")])
    taken = queue.pop(lambda caller: caller != "a")
    assert taken is not None
    assert jobs[taken] == (Priority.NORMAL, "b")
    assert queue.pop(lambda caller: caller != "a") is None
    assert [jobs[job_id] for job_id in drained(queue)] == [(Priority.HIGH, "a"), (Priority.NORMAL, "a")]


@given(entries)
def test_the_jobs_of_the_callers_are_together_all_that_wait(waiting: list[Entry]) -> None:
    queue, _ = filled(waiting)
    for caller in "abc":
        assert queue.num_waiting(caller) == sum(entry[1] == caller for entry in waiting)
