from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from hidream_grpc.engine.protocol.messages import Decode
from hidream_grpc.engine.scheduler import BatchLimits, StepScheduler
from hidream_grpc.engine.step_limit import MAX_WAIT_STEPS, MIN_WAIT_STEPS
from hidream_grpc.model.parameters import GenerationParameters

NO_BUDGET = BatchLimits(max_running_requests=1000, max_step_pixels=2**40)
SMALL, LARGE = (64, 64), (128, 128)


def parameters(size: tuple[int, int] = SMALL, steps: int = 4, num_images: int = 1) -> GenerationParameters:
    return GenerationParameters(
        prompt="a red circle",
        width=size[0],
        height=size[1],
        num_inference_steps=steps,
        guidance_scale=1.0,
        num_images=num_images,
        seed=0,
    )


def step(scheduler: StepScheduler) -> tuple[str, ...]:
    """One round's forward, as the controller runs it."""
    claim_ids = scheduler.next_step()
    scheduler.stepped(claim_ids)
    return claim_ids


def denoised(scheduler: StepScheduler) -> None:
    while step(scheduler):
        pass


def test_requests_of_one_size_share_a_forward_whatever_their_steps() -> None:
    scheduler = StepScheduler(NO_BUDGET)
    scheduler.admit("first", parameters(steps=9))
    assert [step(scheduler) for _ in range(3)] == [("first",)] * 3
    scheduler.admit("second", parameters(steps=5))
    assert set(step(scheduler)) == {"first", "second"}
    assert (scheduler.step_of("first"), scheduler.step_of("second")) == (4, 1)


def test_sizes_take_turns() -> None:
    scheduler = StepScheduler(NO_BUDGET)
    scheduler.admit("small", parameters(SMALL))
    scheduler.admit("large", parameters(LARGE))
    assert [step(scheduler) for _ in range(6)] == [("small",), ("large",)] * 3


def test_a_new_request_enters_at_the_next_step_of_its_size() -> None:
    scheduler = StepScheduler(NO_BUDGET)
    scheduler.admit("old", parameters(SMALL, steps=50))
    step(scheduler)
    scheduler.admit("same size", parameters(SMALL))
    assert set(step(scheduler)) == {"old", "same size"}
    scheduler.admit("other size", parameters(LARGE))
    assert step(scheduler) == ("other size",)


def test_newcomers_never_keep_a_request_of_another_size_waiting() -> None:
    scheduler = StepScheduler(NO_BUDGET)
    scheduler.admit("patient", parameters(LARGE, steps=10))
    for number in range(20):
        scheduler.admit(f"newcomer {number}", parameters(SMALL, steps=1))
        step(scheduler)
    assert scheduler.step_of("patient") == 10


@given(
    st.lists(
        st.tuples(st.sampled_from([SMALL, LARGE, (64, 128)]), st.integers(1, 6), st.integers(1, 3)),
        min_size=1,
        max_size=8,
    ),
    st.integers(64 * 64, 6 * 128 * 128),
)
def test_every_request_gets_all_its_steps_within_the_budget_and_in_batches_of_one_size(
    requests: list[tuple[tuple[int, int], int, int]], max_step_pixels: int
) -> None:
    scheduler = StepScheduler(BatchLimits(1000, max_step_pixels))
    asked = {f"job {n}": parameters(*request) for n, request in enumerate(requests)}
    for claim_id, request in asked.items():
        scheduler.admit(claim_id, request)
    waits = dict.fromkeys(asked, 0)
    taken = dict.fromkeys(asked, 0)
    while claim_ids := step(scheduler):
        assert len({(asked[j].width, asked[j].height) for j in claim_ids}) == 1
        pixels = sum(asked[j].width * asked[j].height * asked[j].num_samples for j in claim_ids)
        assert pixels <= max_step_pixels or len(claim_ids) == 1
        for claim_id in asked:
            waits[claim_id] = 0 if claim_id in claim_ids else waits[claim_id] + 1
            taken[claim_id] += claim_id in claim_ids
            if taken[claim_id] < asked[claim_id].num_inference_steps:
                # Everybody else goes before it once at most.
                assert waits[claim_id] < len(asked)
    assert taken == {claim_id: request.num_inference_steps for claim_id, request in asked.items()}


def test_a_request_larger_than_the_budget_steps_alone() -> None:
    scheduler = StepScheduler(BatchLimits(10, max_step_pixels=2 * 64 * 64))
    scheduler.admit("huge", parameters(num_images=5))
    scheduler.admit("tiny", parameters(num_images=1))
    assert [step(scheduler) for _ in range(4)] == [("huge",), ("tiny",)] * 2


def test_guidance_counts_twice_in_the_budget() -> None:
    scheduler = StepScheduler(BatchLimits(10, max_step_pixels=3 * 64 * 64))
    for claim_id in ("a", "b"):
        guided = GenerationParameters(
            prompt="", width=64, height=64, num_inference_steps=2, guidance_scale=5.0, seed=0
        )
        scheduler.admit(claim_id, guided)
    assert [step(scheduler) for _ in range(2)] == [("a",), ("b",)]


def test_no_more_requests_run_than_allowed_and_an_ended_one_makes_room() -> None:
    scheduler = StepScheduler(BatchLimits(max_running_requests=2, max_step_pixels=2**40))
    has_capacity = []
    for claim_id in ("a", "b"):
        has_capacity.append(scheduler.has_capacity)
        scheduler.admit(claim_id, parameters())
    has_capacity.append(scheduler.has_capacity)
    scheduler.release("a")
    has_capacity.append(scheduler.has_capacity)
    assert has_capacity == [True, True, False, True]
    assert "a" not in scheduler
    assert len(scheduler) == 1


def test_a_cancelled_request_takes_no_further_step() -> None:
    scheduler = StepScheduler(NO_BUDGET)
    scheduler.admit("stays", parameters())
    scheduler.admit("leaves", parameters())
    in_flight = scheduler.next_step()
    scheduler.release("leaves")
    scheduler.stepped(in_flight)
    assert step(scheduler) == ("stays",)


def test_each_rank_decodes_one_image_at_most_the_oldest_request_first() -> None:
    scheduler = StepScheduler(NO_BUDGET)
    scheduler.admit("first", parameters(steps=1, num_images=3))
    scheduler.admit("second", parameters(steps=1, num_images=1))
    assert scheduler.next_decodes(world_size=2) == ()
    denoised(scheduler)
    rounds = []
    while decodes := scheduler.next_decodes(world_size=2):
        scheduler.planned(decodes)
        assert len({decode.rank for decode in decodes}) == len(decodes)
        rounds.append([(decode.claim_id, decode.image_index) for decode in decodes])
        for decode in decodes:
            scheduler.decoded(decode.claim_id, decode.image_index)
    assert rounds == [[("first", 0), ("first", 1)], [("first", 2), ("second", 0)]]
    assert scheduler.is_finished("first")
    assert scheduler.is_finished("second")


def test_an_image_that_is_being_decoded_is_not_planned_again() -> None:
    scheduler = StepScheduler(NO_BUDGET)
    scheduler.admit("a", parameters(steps=1, num_images=2))
    denoised(scheduler)
    (first,) = scheduler.next_decodes(world_size=1)
    scheduler.planned((first,))
    (second,) = scheduler.next_decodes(world_size=2)
    assert (first.image_index, second.image_index) == (0, 1)
    assert not scheduler.is_finished("a")


def test_a_rank_gets_no_other_image_before_it_has_finished_its_own() -> None:
    scheduler = StepScheduler(NO_BUDGET)
    scheduler.admit("a", parameters(steps=1, num_images=4))
    denoised(scheduler)
    scheduler.planned(scheduler.next_decodes(world_size=2))
    assert scheduler.decoding
    assert scheduler.next_decodes(world_size=2) == ()
    scheduler.decoded("a", 1)
    next_decodes = scheduler.next_decodes(world_size=2)
    assert next_decodes == (Decode(claim_id="a", image_index=2, rank=1),)
    scheduler.planned(next_decodes)
    scheduler.decoded("a", 0)
    assert scheduler.next_decodes(world_size=2) == (Decode(claim_id="a", image_index=3, rank=0),)


def test_the_ranks_of_a_cancelled_request_are_free_for_others() -> None:
    scheduler = StepScheduler(NO_BUDGET)
    scheduler.admit("cancelled", parameters(steps=1, num_images=2))
    scheduler.admit("waits", parameters(steps=1, num_images=1))
    denoised(scheduler)
    scheduler.planned(scheduler.next_decodes(world_size=2))
    assert scheduler.next_decodes(world_size=2) == ()
    scheduler.release("cancelled")
    assert not scheduler.decoding
    assert scheduler.next_decodes(world_size=2) == (Decode(claim_id="waits", image_index=0, rank=0),)


def test_nothing_is_being_decoded_before_the_first_image_and_after_the_last() -> None:
    scheduler = StepScheduler(NO_BUDGET)
    scheduler.admit("a", parameters(steps=1))
    seen = [bool(scheduler.decoding)]
    denoised(scheduler)
    seen.append(bool(scheduler.decoding))
    scheduler.planned(scheduler.next_decodes(world_size=2))
    seen.append(bool(scheduler.decoding))
    scheduler.decoded("a", 0)
    seen.append(bool(scheduler.decoding))
    assert seen == [False, False, True, False]


def test_decoding_does_not_keep_other_requests_from_their_steps() -> None:
    scheduler = StepScheduler(NO_BUDGET)
    scheduler.admit("decodes", parameters(steps=1))
    step(scheduler)
    scheduler.admit("steps", parameters())
    assert scheduler.next_step() == ("steps",)
    assert scheduler.next_decodes(2) == (Decode(claim_id="decodes", image_index=0, rank=0),)


def test_a_restarted_request_takes_all_its_steps_again_and_keeps_what_is_decoded() -> None:
    scheduler = StepScheduler(NO_BUDGET)
    scheduler.admit("a", parameters(steps=2, num_images=2))
    denoised(scheduler)
    both = scheduler.next_decodes(world_size=2)
    scheduler.planned(both)
    scheduler.decoded("a", 0)
    scheduler.restart("a")
    assert (scheduler.step_of("a"), scheduler.next_decodes(2), scheduler.decoding) == (0, (), ())
    denoised(scheduler)
    assert scheduler.step_of("a") == 2
    assert [decode.image_index for decode in scheduler.next_decodes(2)] == [1]


def test_news_of_a_request_that_has_left_are_ignored() -> None:
    scheduler = StepScheduler(NO_BUDGET)
    scheduler.release("unknown")
    scheduler.stepped(("unknown",))
    scheduler.decoded("unknown", 0)
    assert scheduler.next_step() == ()


def test_a_request_may_go_on_after_some_of_its_steps_and_images() -> None:
    scheduler = StepScheduler(NO_BUDGET)
    scheduler.admit("a", parameters(steps=4, num_images=3), step=3, finished_images=frozenset({1}))
    denoised(scheduler)
    assert scheduler.step_of("a") == 4
    assert [decode.image_index for decode in scheduler.next_decodes(4)] == [0, 2]
    assert scheduler.progress_of("a") == 5


def test_only_those_that_are_ready_step_and_are_decoded() -> None:
    scheduler = StepScheduler(NO_BUDGET)
    for claim_id in ("a", "b"):
        scheduler.admit(claim_id, parameters(steps=1))
    assert scheduler.next_step({"b"}) == ("b",)
    denoised(scheduler)
    assert [decode.claim_id for decode in scheduler.next_decodes(4, {"a"})] == ["a"]


def test_half_of_what_did_not_fit_is_the_limit() -> None:
    scheduler = StepScheduler(BatchLimits(10, max_step_pixels=10 * 64 * 64))
    for claim_id in ("a", "b"):
        scheduler.admit(claim_id, parameters(num_images=4))
    scheduler.lower_limit(("a", "b"))
    assert scheduler.max_step_pixels == 4 * 64 * 64
    scheduler.lower_limit(("a", "b"))
    scheduler.lower_limit(("gone",))
    assert scheduler.max_step_pixels == 4 * 64 * 64
    assert [len(step(scheduler)) for _ in range(2)] == [1, 1]


def run_out_of_memory(scheduler: StepScheduler) -> None:
    """Four requests of one sample each are there, and do not fit together."""
    scheduler.lower_limit(("a", "b", "c", "d"))
    assert len(step(scheduler)) == 2


def with_four_requests() -> StepScheduler:
    scheduler = StepScheduler(BatchLimits(10, max_step_pixels=5 * 64 * 64))
    for claim_id in ("a", "b", "c", "d"):
        scheduler.admit(claim_id, parameters(steps=10**9))
    return scheduler


def steps_until_it_rises(scheduler: StepScheduler) -> int:
    before = scheduler.max_step_pixels
    for num_steps in range(1, 10**6):
        step(scheduler)
        if scheduler.max_step_pixels > before:
            return num_steps
    raise AssertionError("the limit does not rise")


def test_a_lowered_limit_rises_by_quarters_to_the_configured_one_while_it_holds_requests_back() -> None:
    scheduler = with_four_requests()
    run_out_of_memory(scheduler)
    limits = [scheduler.max_step_pixels]
    assert steps_until_it_rises(scheduler) == MIN_WAIT_STEPS - 1
    limits.append(scheduler.max_step_pixels)
    while scheduler.max_step_pixels < 4 * 64 * 64:
        assert steps_until_it_rises(scheduler) == MIN_WAIT_STEPS
        limits.append(scheduler.max_step_pixels)
    assert all(after == before * 5 // 4 for before, after in itertools.pairwise(limits))
    assert len(step(scheduler)) == 4


def test_a_limit_that_holds_nobody_back_stays() -> None:
    scheduler = with_four_requests()
    run_out_of_memory(scheduler)
    for claim_id in ("b", "c", "d"):
        scheduler.release(claim_id)
    lowered = scheduler.max_step_pixels
    for _ in range(2 * MIN_WAIT_STEPS):
        step(scheduler)
    assert scheduler.max_step_pixels == lowered


def test_a_limit_never_rises_above_the_configured_one() -> None:
    scheduler = with_four_requests()
    scheduler.admit("e", parameters(steps=10**9))
    scheduler.admit("f", parameters(steps=10**9))
    run_out_of_memory(scheduler)
    for _ in range(10 * MIN_WAIT_STEPS):
        step(scheduler)
    assert scheduler.max_step_pixels == 5 * 64 * 64


def test_each_further_lack_of_memory_doubles_the_steps_before_the_limit_rises_up_to_a_bound() -> None:
    scheduler = with_four_requests()
    waits = []
    for _ in range(9):
        run_out_of_memory(scheduler)
        waits.append(steps_until_it_rises(scheduler) + 1)
    assert waits[:3] == [MIN_WAIT_STEPS, 2 * MIN_WAIT_STEPS, 4 * MIN_WAIT_STEPS]
    assert waits[-1] == MAX_WAIT_STEPS


def test_a_limit_that_is_lifted_is_the_configured_one_at_once_and_its_failures_still_count() -> None:
    scheduler = with_four_requests()
    run_out_of_memory(scheduler)
    scheduler.lift_limit()
    assert scheduler.max_step_pixels == 5 * 64 * 64
    run_out_of_memory(scheduler)
    assert steps_until_it_rises(scheduler) + 1 == 2 * MIN_WAIT_STEPS


def test_a_limit_that_is_forgotten_is_the_configured_one_at_once_and_its_failures_do_not_count() -> None:
    scheduler = with_four_requests()
    run_out_of_memory(scheduler)
    scheduler.forget_limit()
    assert scheduler.max_step_pixels == 5 * 64 * 64
    run_out_of_memory(scheduler)
    assert steps_until_it_rises(scheduler) + 1 == MIN_WAIT_STEPS
