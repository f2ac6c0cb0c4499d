"""What is learnt from measured times, and what follows for shapes that were never measured."""

from __future__ import annotations

import pytest

from hidream_grpc.engine.requests import StepReport
from hidream_grpc.jobs.estimates.durations import MAX_SHAPES, NUM_KEPT, MeasuredDurations


def learnt(*steps: tuple[int, int, int, float]) -> MeasuredDurations:
    durations = MeasuredDurations()
    for width, height, num_samples, seconds in steps:
        durations.note_step(StepReport(seconds, width, height, num_samples))
    return durations


def test_a_first_step_that_is_slow_does_not_spoil_the_mean() -> None:
    durations = learnt((512, 512, 1, 30.0), *((512, 512, 1, 1.0) for _ in range(7)))
    assert durations.step_seconds(512, 512, 1) == pytest.approx(1.0)


def test_steps_that_become_slower_are_believed_once_they_are_the_newest() -> None:
    durations = learnt(
        *((512, 512, 1, 1.0) for _ in range(100)), *((512, 512, 1, 2.0) for _ in range(NUM_KEPT))
    )
    assert durations.step_seconds(512, 512, 1) == pytest.approx(2.0)


def test_a_shape_between_two_measured_ones_is_on_the_line_between_them() -> None:
    durations = learnt((512, 512, 1, 1.0), (512, 512, 4, 2.5))
    assert durations.step_seconds(512, 512, 3) == pytest.approx(2.0)
    assert durations.step_seconds(1024, 512, 1) == pytest.approx(1.5)


def test_steps_with_longer_prompts_have_durations_of_their_own() -> None:
    durations = MeasuredDurations()
    durations.note_step(StepReport(1.0, 512, 512, 2))
    assert durations.step_seconds(512, 512, 2, prompt_tokens=256) == pytest.approx(1.0)
    durations.note_step(StepReport(1.5, 512, 512, 2, prompt_tokens=256))
    assert durations.step_seconds(512, 512, 2, prompt_tokens=256) == pytest.approx(1.5)
    assert durations.step_seconds(512, 512, 2) == pytest.approx(1.0)


@pytest.mark.parametrize(("num_samples", "seconds"), [(1, 0.5), (8, 4.0)])
def test_a_shape_is_in_proportion_to_the_only_one_measured(num_samples: int, seconds: float) -> None:
    durations = learnt((512, 512, 2, 1.0))
    assert durations.step_seconds(512, 512, num_samples) == pytest.approx(seconds)


@pytest.mark.parametrize(("num_samples", "seconds"), [(1, 1.1), (8, 1.8)])
def test_a_shape_beyond_all_measured_ones_keeps_the_fixed_part_of_a_step(
    num_samples: int, seconds: float
) -> None:
    durations = learnt((512, 512, 2, 1.2), (512, 512, 4, 1.4))
    assert durations.step_seconds(512, 512, num_samples) == pytest.approx(seconds)


def test_a_larger_shape_never_takes_less_than_a_measured_one() -> None:
    durations = learnt((512, 512, 2, 1.2), (512, 512, 4, 1.1))
    assert durations.step_seconds(512, 512, 8) == pytest.approx(1.1)


def test_a_measured_shape_is_not_scaled_from_others() -> None:
    durations = learnt((512, 512, 4, 1.0), (1024, 1024, 1, 3.0))
    assert durations.step_seconds(512, 512, 4) == pytest.approx(1.0)
    assert durations.step_seconds(1024, 1024, 1) == pytest.approx(3.0)


def test_an_image_size_that_was_never_decoded_is_scaled_by_its_pixels() -> None:
    durations = MeasuredDurations()
    assert durations.image_seconds(512, 512) == 0.0
    durations.note_image(512, 512, 0.5)
    assert durations.image_seconds(1024, 1024) == pytest.approx(2.0)


def test_time_between_steps_is_learnt_from_rounds_that_held_nothing_else() -> None:
    durations = MeasuredDurations()
    durations.note_step(StepReport(1.0, 512, 512, 1, round_seconds=None))
    assert durations.seconds_between_steps == 0.0
    durations.note_step(StepReport(1.0, 512, 512, 1, round_seconds=1.25))
    assert durations.seconds_between_steps == pytest.approx(0.25)


def test_callers_that_ask_for_ever_new_sizes_do_not_fill_the_memory() -> None:
    durations = learnt(*((64, 16 * n, 1, 64.0 * n) for n in range(1, 2 * MAX_SHAPES)))
    assert len(durations._steps._measured) == MAX_SHAPES
    # The newest are known exactly, the oldest still follow from them.
    assert durations.step_seconds(64, 16 * 300, 1) == pytest.approx(64.0 * 300)
    assert durations.step_seconds(64, 16, 1) == pytest.approx(64.0)
