from __future__ import annotations

import itertools
from dataclasses import dataclass, field

from hidream_grpc.engine.running_request import RunningRequest
from hidream_grpc.engine.scheduler import next_forward, note_forward, step_pixels
from hidream_grpc.engine.step_limit import MAX_WAIT_STEPS, MIN_WAIT_STEPS, RETRY_FACTOR, StepLimit
from hidream_grpc.model.parameters import GenerationParameters, SampleSize
from tests.support.running_requests import running_request


@dataclass
class Rounds:
    """Rounds under a limit, as the controller runs them."""

    limit: StepLimit
    running: dict[str, RunningRequest] = field(default_factory=dict)

    def start(self, *claim_ids: str, num_images: int = 1) -> None:
        parameters = GenerationParameters(
            prompt="",
            width=64,
            height=64,
            num_inference_steps=10**9,
            guidance_scale=1.0,
            num_images=num_images,
            seed=0,
        )
        for claim_id in claim_ids:
            self.running[claim_id] = running_request(claim_id, parameters)

    def step(self) -> tuple[str, ...]:
        forward = next_forward(self.running, self.limit.pixels)
        note_forward(self.running, forward.claim_ids, step_seconds=1.0)
        pixels = step_pixels(self.running, forward.claim_ids)
        self.limit.observe(SampleSize(64, 64), pixels, None, is_full=forward.is_full)
        return forward.claim_ids

    def run_out(self, *claim_ids: str) -> None:
        """A step of these requests does not fit."""
        self.limit.run_out(step_pixels(self.running, claim_ids))


def test_half_of_what_did_not_fit_is_the_limit() -> None:
    rounds = Rounds(StepLimit(10 * 64 * 64))
    rounds.start("a", "b", num_images=4)
    rounds.run_out("a", "b")
    assert rounds.limit.pixels == 4 * 64 * 64
    rounds.run_out("a", "b")
    rounds.run_out("gone")
    assert rounds.limit.pixels == 4 * 64 * 64
    assert [len(rounds.step()) for _ in range(2)] == [1, 1]


def run_out_of_memory(rounds: Rounds) -> None:
    """Four requests of one sample each are there, and do not fit together."""
    rounds.run_out("a", "b", "c", "d")
    assert len(rounds.step()) == 2


def with_four_requests() -> Rounds:
    rounds = Rounds(StepLimit(5 * 64 * 64))
    rounds.start("a", "b", "c", "d")
    return rounds


def steps_until_it_rises(rounds: Rounds) -> int:
    before = rounds.limit.pixels
    for num_steps in range(1, 10**6):
        rounds.step()
        if rounds.limit.pixels > before:
            return num_steps
    raise AssertionError("the limit does not rise")


def test_a_lowered_limit_rises_by_quarters_to_just_below_what_failed_while_it_holds_requests_back() -> None:
    rounds = with_four_requests()
    run_out_of_memory(rounds)
    limits = [rounds.limit.pixels]
    assert steps_until_it_rises(rounds) == MIN_WAIT_STEPS - 1
    limits.append(rounds.limit.pixels)
    while rounds.limit.pixels < 4 * 64 * 64 - 1:
        assert steps_until_it_rises(rounds) == MIN_WAIT_STEPS
        limits.append(rounds.limit.pixels)
    assert all(after == before * 5 // 4 for before, after in itertools.pairwise(limits[:-1]))
    assert len(rounds.step()) == 3


def test_what_failed_is_tried_again_after_very_many_steps() -> None:
    rounds = with_four_requests()
    run_out_of_memory(rounds)
    while rounds.limit.pixels < 4 * 64 * 64 - 1:
        rounds.step()
    assert steps_until_it_rises(rounds) == RETRY_FACTOR * MIN_WAIT_STEPS + 1
    assert len(rounds.step()) == 4


def test_a_limit_that_holds_no_request_back_stays() -> None:
    rounds = with_four_requests()
    run_out_of_memory(rounds)
    for claim_id in ("b", "c", "d"):
        del rounds.running[claim_id]
    lowered = rounds.limit.pixels
    for _ in range(2 * MIN_WAIT_STEPS):
        rounds.step()
    assert rounds.limit.pixels == lowered


def test_a_limit_never_rises_above_the_configured_one() -> None:
    rounds = with_four_requests()
    rounds.start("e")
    rounds.start("f")
    run_out_of_memory(rounds)
    for _ in range((RETRY_FACTOR + 20) * MIN_WAIT_STEPS):
        rounds.step()
    assert rounds.limit.pixels == 5 * 64 * 64


def test_each_further_lack_of_memory_doubles_the_steps_before_the_limit_rises_up_to_a_bound() -> None:
    rounds = with_four_requests()
    waits = []
    for _ in range(9):
        run_out_of_memory(rounds)
        waits.append(steps_until_it_rises(rounds) + 1)
    assert waits[:3] == [MIN_WAIT_STEPS, 2 * MIN_WAIT_STEPS, 4 * MIN_WAIT_STEPS]
    assert waits[-1] == MAX_WAIT_STEPS


def test_a_limit_that_is_lifted_is_the_configured_one_at_once_and_its_failures_still_count() -> None:
    rounds = with_four_requests()
    run_out_of_memory(rounds)
    rounds.limit.lift()
    assert rounds.limit.pixels == 5 * 64 * 64
    run_out_of_memory(rounds)
    assert steps_until_it_rises(rounds) + 1 == 2 * MIN_WAIT_STEPS


def test_a_limit_that_is_forgotten_is_the_configured_one_at_once_and_its_failures_do_not_count() -> None:
    rounds = with_four_requests()
    run_out_of_memory(rounds)
    rounds.limit.forget()
    assert rounds.limit.pixels == 5 * 64 * 64
    run_out_of_memory(rounds)
    assert steps_until_it_rises(rounds) + 1 == MIN_WAIT_STEPS
