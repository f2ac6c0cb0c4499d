from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hidream_grpc.engine.admissions import MAX_ADMITTED_SNAPSHOT_BYTES
from hidream_grpc.engine.protocol.messages import Decode, StepPlan
from hidream_grpc.engine.running_request import RunningRequest, Snapshot
from hidream_grpc.engine.scheduler import (
    free_ranks,
    next_decodes,
    next_forward,
    note_decodes,
    note_forward,
    schedule,
    step_pixels,
)
from hidream_grpc.engine.snapshot_schedule import SnapshotBudget
from hidream_grpc.model.checkpoint.prompt_lengths import PROMPT_TOKEN_BUCKETS
from hidream_grpc.model.parameters import GenerationParameters
from tests.support.running_requests import running_request

NO_LIMIT = 2**40
SMALL, LARGE = (64, 64), (128, 128)


def parameters(
    size: tuple[int, int] = SMALL, steps: int = 4, num_images: int = 1, prompt_tokens: int = 128
) -> GenerationParameters:
    return GenerationParameters(
        prompt="a red circle",
        width=size[0],
        height=size[1],
        num_inference_steps=steps,
        guidance_scale=1.0,
        num_images=num_images,
        seed=0,
        prompt_tokens=prompt_tokens,
    )


def start(
    running: dict[str, RunningRequest],
    claim_id: str,
    parameters: GenerationParameters,
    step: int = 0,
    finished_images: frozenset[int] = frozenset(),
) -> None:
    running[claim_id] = running_request(claim_id, parameters, step, finished_images)


def step(running: dict[str, RunningRequest], max_step_pixels: int = NO_LIMIT) -> tuple[str, ...]:
    """One round's forward, as the controller runs it."""
    claim_ids = next_forward(running, max_step_pixels).claim_ids
    note_forward(running, claim_ids, step_seconds=1.0)
    return claim_ids


def denoise(running: dict[str, RunningRequest]) -> None:
    while step(running):
        pass


def decodes_of(running: dict[str, RunningRequest], world_size: int) -> tuple[Decode, ...]:
    return next_decodes(running, free_ranks(running, world_size))


def decoding(running: dict[str, RunningRequest]) -> list[str]:
    return [claim_id for claim_id, request in running.items() if request.decoding]


def test_requests_of_one_size_share_a_forward_whatever_their_steps() -> None:
    running: dict[str, RunningRequest] = {}
    start(running, "first", parameters(steps=9))
    assert [step(running) for _ in range(3)] == [("first",)] * 3
    start(running, "second", parameters(steps=5))
    assert set(step(running)) == {"first", "second"}
    assert (running["first"].step, running["second"].step) == (4, 1)


def test_sizes_take_turns() -> None:
    running: dict[str, RunningRequest] = {}
    start(running, "small", parameters(SMALL))
    start(running, "large", parameters(LARGE))
    assert [step(running) for _ in range(6)] == [("small",), ("large",)] * 3


def test_a_new_request_enters_at_the_next_step_of_its_size() -> None:
    running: dict[str, RunningRequest] = {}
    start(running, "old", parameters(SMALL, steps=50))
    step(running)
    start(running, "same size", parameters(SMALL))
    assert set(step(running)) == {"old", "same size"}
    start(running, "other size", parameters(LARGE))
    assert step(running) == ("other size",)


def test_newcomers_never_keep_a_request_of_another_size_waiting() -> None:
    running: dict[str, RunningRequest] = {}
    start(running, "patient", parameters(LARGE, steps=10))
    for number in range(20):
        start(running, f"newcomer {number}", parameters(SMALL, steps=1))
        step(running)
    assert running["patient"].step == 10


@given(
    st.lists(
        st.tuples(
            st.sampled_from([SMALL, LARGE, (64, 128)]),
            st.integers(1, 6),
            st.integers(1, 3),
            st.sampled_from(PROMPT_TOKEN_BUCKETS),
        ),
        min_size=1,
        max_size=8,
    ),
    st.integers(64 * 64, 6 * 128 * 128),
)
def test_every_request_gets_all_its_steps_within_the_budget_and_in_batches_of_one_size(
    requests: list[tuple[tuple[int, int], int, int, int]], max_step_pixels: int
) -> None:
    running: dict[str, RunningRequest] = {}
    asked = {f"job {n}": parameters(*request) for n, request in enumerate(requests)}
    for claim_id, request in asked.items():
        start(running, claim_id, request)
    waits = dict.fromkeys(asked, 0)
    taken = dict.fromkeys(asked, 0)
    while claim_ids := step(running, max_step_pixels):
        assert len({(asked[j].width, asked[j].height, asked[j].prompt_tokens) for j in claim_ids}) == 1
        pixels = sum(asked[j].width * asked[j].height * asked[j].num_samples for j in claim_ids)
        assert pixels <= max_step_pixels or len(claim_ids) == 1
        for claim_id in asked:
            waits[claim_id] = 0 if claim_id in claim_ids else waits[claim_id] + 1
            taken[claim_id] += claim_id in claim_ids
            if taken[claim_id] < asked[claim_id].num_inference_steps:
                # Each of the others goes before it once at most.
                assert waits[claim_id] < len(asked)
    assert taken == {claim_id: request.num_inference_steps for claim_id, request in asked.items()}


def test_a_request_larger_than_the_budget_steps_alone() -> None:
    running: dict[str, RunningRequest] = {}
    start(running, "huge", parameters(num_images=5))
    start(running, "tiny", parameters(num_images=1))
    assert [step(running, max_step_pixels=2 * 64 * 64) for _ in range(4)] == [("huge",), ("tiny",)] * 2


def test_guidance_counts_twice_in_the_budget() -> None:
    running: dict[str, RunningRequest] = {}
    for claim_id in ("a", "b"):
        guided = GenerationParameters(
            prompt="", width=64, height=64, num_inference_steps=2, guidance_scale=5.0, seed=0
        )
        start(running, claim_id, guided)
    assert [step(running, max_step_pixels=3 * 64 * 64) for _ in range(2)] == [("a",), ("b",)]


def test_a_cancelled_request_takes_no_further_step() -> None:
    running: dict[str, RunningRequest] = {}
    start(running, "stays", parameters())
    start(running, "leaves", parameters())
    in_flight = next_forward(running, NO_LIMIT).claim_ids
    del running["leaves"]
    note_forward(running, in_flight, step_seconds=1.0)
    assert step(running) == ("stays",)


def test_each_rank_decodes_one_image_at_most_the_oldest_request_first() -> None:
    running: dict[str, RunningRequest] = {}
    start(running, "first", parameters(steps=1, num_images=3))
    start(running, "second", parameters(steps=1, num_images=1))
    assert decodes_of(running, 2) == ()
    denoise(running)
    rounds = []
    while decodes := decodes_of(running, 2):
        note_decodes(running, decodes)
        assert len({decode.rank for decode in decodes}) == len(decodes)
        rounds.append([(decode.claim_id, decode.image_index) for decode in decodes])
        for decode in decodes:
            running[decode.claim_id].finish_image(decode.image_index)
    assert rounds == [[("first", 0), ("first", 1)], [("first", 2), ("second", 0)]]
    assert running["first"].is_finished
    assert running["second"].is_finished


def test_an_image_that_is_being_decoded_is_not_planned_again() -> None:
    running: dict[str, RunningRequest] = {}
    start(running, "a", parameters(steps=1, num_images=2))
    denoise(running)
    (first,) = decodes_of(running, 1)
    note_decodes(running, (first,))
    (second,) = decodes_of(running, 2)
    assert (first.image_index, second.image_index) == (0, 1)
    assert not running["a"].is_finished


def test_a_rank_gets_no_other_image_before_it_has_finished_its_own() -> None:
    running: dict[str, RunningRequest] = {}
    start(running, "a", parameters(steps=1, num_images=4))
    denoise(running)
    note_decodes(running, decodes_of(running, 2))
    assert decoding(running)
    assert decodes_of(running, 2) == ()
    running["a"].finish_image(1)
    next_decodes = decodes_of(running, 2)
    assert next_decodes == (Decode(claim_id="a", image_index=2, rank=1),)
    note_decodes(running, next_decodes)
    running["a"].finish_image(0)
    assert decodes_of(running, 2) == (Decode(claim_id="a", image_index=3, rank=0),)


def test_the_ranks_of_a_cancelled_request_are_free_for_others() -> None:
    running: dict[str, RunningRequest] = {}
    start(running, "cancelled", parameters(steps=1, num_images=2))
    start(running, "waits", parameters(steps=1, num_images=1))
    denoise(running)
    note_decodes(running, decodes_of(running, 2))
    assert decodes_of(running, 2) == ()
    del running["cancelled"]
    assert not decoding(running)
    assert decodes_of(running, 2) == (Decode(claim_id="waits", image_index=0, rank=0),)


def test_nothing_is_being_decoded_before_the_first_image_and_after_the_last() -> None:
    running: dict[str, RunningRequest] = {}
    start(running, "a", parameters(steps=1))
    seen = [bool(decoding(running))]
    denoise(running)
    seen.append(bool(decoding(running)))
    note_decodes(running, decodes_of(running, 2))
    seen.append(bool(decoding(running)))
    running["a"].finish_image(0)
    seen.append(bool(decoding(running)))
    assert seen == [False, False, True, False]


def test_decoding_does_not_keep_other_requests_from_their_steps() -> None:
    running: dict[str, RunningRequest] = {}
    start(running, "decodes", parameters(steps=1))
    step(running)
    start(running, "steps", parameters())
    assert next_forward(running, NO_LIMIT) == (("steps",), False)
    assert decodes_of(running, 2) == (Decode(claim_id="decodes", image_index=0, rank=0),)


def test_a_restarted_request_takes_all_its_steps_again_and_keeps_what_is_decoded() -> None:
    running: dict[str, RunningRequest] = {}
    start(running, "a", parameters(steps=2, num_images=2))
    denoise(running)
    both = decodes_of(running, 2)
    note_decodes(running, both)
    running["a"].finish_image(0)
    running["a"].restart("a test")
    assert (running["a"].step, decodes_of(running, 2), decoding(running)) == (0, (), [])
    denoise(running)
    assert running["a"].step == 2
    assert [decode.image_index for decode in decodes_of(running, 2)] == [1]


def test_news_of_a_request_that_has_left_are_ignored() -> None:
    running: dict[str, RunningRequest] = {}
    note_forward(running, ("unknown",), step_seconds=1.0)
    note_decodes(running, (Decode(claim_id="unknown", image_index=0, rank=0),))
    assert step_pixels(running, ("unknown",)) == 0
    assert next_forward(running, NO_LIMIT) == ((), False)


def test_a_request_may_go_on_after_some_of_its_steps_and_images() -> None:
    running: dict[str, RunningRequest] = {}
    start(running, "a", parameters(steps=4, num_images=3), step=3, finished_images=frozenset({1}))
    denoise(running)
    assert running["a"].step == 4
    assert [decode.image_index for decode in decodes_of(running, 4)] == [0, 2]
    assert running["a"].progress == 5


def test_a_forward_that_leaves_out_requests_for_want_of_room_is_full() -> None:
    running: dict[str, RunningRequest] = {}
    for claim_id in ("a", "b"):
        start(running, claim_id, parameters())
    start(running, "large", parameters(LARGE))
    assert next_forward(running, 2 * 64 * 64) == (("a", "b"), False)
    assert next_forward(running, 64 * 64) == (("a",), True)


def plan_of(running: dict[str, RunningRequest]) -> StepPlan:
    planned = schedule(
        running,
        held=frozenset(),
        plan_id=1,
        world_size=4,
        max_step_pixels=NO_LIMIT,
        step_pixels_by_size={},
        now=0.0,
        snapshot_budget=SnapshotBudget(),
        latest_step_seconds=None,
    )
    assert planned is not None
    return planned.plan


def test_beside_a_suspect_no_other_steps_and_none_is_decoded() -> None:
    running: dict[str, RunningRequest] = {}
    for claim_id in ("a", "b"):
        start(running, claim_id, parameters(steps=1))
    running["b"].suspect(0)
    assert plan_of(running).step_claims == ("b",)
    running["b"].cleared_above = None
    denoise(running)
    running["a"].suspect(1)
    assert [decode.claim_id for decode in plan_of(running).decodes] == ["a"]


def test_a_request_that_the_ranks_have_yet_to_start_takes_no_step() -> None:
    running: dict[str, RunningRequest] = {}
    for claim_id in ("a", "b"):
        start(running, claim_id, parameters())
        running[claim_id].snapshot = Snapshot(1, bytes(MAX_ADMITTED_SNAPSHOT_BYTES))
    plan = plan_of(running)
    assert [admission.claim_id for admission in plan.admissions] == ["a"]
    assert plan.step_claims == ("a",)
