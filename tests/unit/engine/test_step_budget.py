"""What a step may hold, learnt on simulated devices by the engine's own scheduler."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hidream_grpc.engine.scheduler import next_forward, note_forward, step_pixels
from hidream_grpc.engine.step_budget import LEAST_PIXELS, MIN_GAIN, MIN_HOLD_STEPS, NUM_MEASURED
from hidream_grpc.engine.step_limit import MAX_SIZES, MIN_WAIT_STEPS, RETRY_FACTOR, StepLimit
from hidream_grpc.model.parameters import GenerationParameters, SampleSize
from tests.support.running_requests import running_request

MAX_PIXELS = 8 * LEAST_PIXELS
LEVELS = tuple(LEAST_PIXELS << level for level in range(4))
SIZE = SampleSize(1024, 1024)
SECONDS_PER_LEAST_STEP = 0.1
MAX_LOSS = 1.1
"""How much longer a pixel may take at what was learnt than at the best budget, where times have no noise."""

Curve = Callable[[int], float]
"""Seconds of a step by its pixels."""


def flat(pixels: int) -> float:
    return SECONDS_PER_LEAST_STEP * pixels / LEAST_PIXELS


def linear(fixed_seconds: float) -> Curve:
    return lambda pixels: fixed_seconds + flat(pixels)


def knee(knee_pixels: float) -> Curve:
    """A device that takes as long for less as for what fills it."""
    return lambda pixels: flat(max(pixels, int(knee_pixels)))


def worse_together(exponent: float) -> Curve:
    """A device on which batches are slower than their requests one by one."""
    return lambda pixels: flat(LEAST_PIXELS) * (pixels / LEAST_PIXELS) ** exponent


CURVES = st.one_of(
    st.just(flat),
    st.floats(0.0, 2.0).map(linear),
    st.floats(0.5 * LEAST_PIXELS, 2.0 * MAX_PIXELS).map(knee),
    st.floats(1.0, 2.0).map(worse_together),
)


@dataclass
class Device:
    """More requests of 1024×1024 than fit a step, on a device whose times and memory are given."""

    curve: Curve
    limit: StepLimit = field(default_factory=lambda: StepLimit(MAX_PIXELS))
    memory_pixels: float = float("inf")
    noise: Callable[[], float] = lambda: 1.0
    seconds: float = 0.0
    num_pixels: int = 0

    def step(self) -> int | None:
        """Run a full step; returns its pixels where these did not fit."""
        self.limit.know((SIZE,))
        pixels = max(1, self.limit.by_size[SIZE] // LEAST_PIXELS) * LEAST_PIXELS
        if pixels > self.memory_pixels:
            self.limit.run_out(pixels)
            return pixels
        seconds = self.curve(pixels) * self.noise()
        self.limit.observe(SIZE, pixels, seconds, is_full=True)
        self.seconds += seconds
        self.num_pixels += pixels
        return None

    def steps(self, num_steps: int) -> list[int]:
        """Run full steps; returns the pixels of those that did not fit."""
        return [failed for _ in range(num_steps) if (failed := self.step())]

    @property
    def learnt(self) -> int:
        return self.limit.learnt[SIZE]


def loss_at(pixels: int, curve: Curve) -> float:
    """How much longer a pixel takes at a budget than at the best one."""
    rates = {level: curve(level) / level for level in LEVELS}
    return rates[pixels] / min(rates.values())


@given(curve=CURVES, first_pixels=st.sampled_from([LEAST_PIXELS, MAX_PIXELS]))
@settings(max_examples=40)
def test_what_is_learnt_takes_at_most_a_tenth_longer_for_a_pixel_than_the_best_budget(
    curve: Curve, first_pixels: int
) -> None:
    device = Device(curve)
    device.limit.begin({SIZE: first_pixels})
    device.steps(300)
    assert loss_at(device.learnt, curve) <= MAX_LOSS


def test_a_new_server_has_found_a_budget_after_the_steps_of_two_jobs() -> None:
    device = Device(linear(0.5))
    device.steps(5 * NUM_MEASURED)
    assert device.learnt == MAX_PIXELS


@pytest.mark.parametrize(
    ("curve", "learnt"), [(flat, LEAST_PIXELS), (knee(2 * LEAST_PIXELS), 2 * LEAST_PIXELS)]
)
def test_steps_are_no_longer_than_pays(curve: Curve, learnt: int) -> None:
    device = Device(curve)
    device.limit.begin({SIZE: MAX_PIXELS})
    device.steps(500)
    assert device.learnt == learnt


@pytest.mark.parametrize(("gain", "learnt"), [(0.5 * MIN_GAIN, LEAST_PIXELS), (1.5 * MIN_GAIN, MAX_PIXELS)])
def test_a_step_of_twice_the_pixels_must_save_the_least_gain(gain: float, learnt: int) -> None:
    device = Device(lambda pixels: flat(pixels) * (1 - gain) ** (pixels // LEAST_PIXELS - 1).bit_length())
    device.steps(200)
    assert device.learnt == learnt


@given(curve=CURVES, seed=st.integers(0, 2**32))
@settings(max_examples=15)
def test_trials_and_noise_cost_little_over_many_steps(curve: Curve, seed: int) -> None:
    noise = random.Random(seed)
    device = Device(curve, noise=lambda: noise.lognormvariate(0.0, 0.05))
    device.steps(1000)
    best = min(curve(pixels) / pixels for pixels in LEVELS)
    assert device.seconds / device.num_pixels <= 1.25 * best


def test_a_step_that_compiles_spoils_no_trial() -> None:
    seen: set[int] = set()

    def compiling(pixels: int) -> float:
        is_new = pixels not in seen
        seen.add(pixels)
        return linear(0.5)(pixels) + (60.0 if is_new else 0.0)

    device = Device(compiling)
    device.steps(5 * NUM_MEASURED)
    assert device.learnt == MAX_PIXELS


def test_a_trial_that_what_waits_does_not_fill_ends() -> None:
    limit = StepLimit(MAX_PIXELS)
    num_steps = 0
    for _ in range(2 * MIN_HOLD_STEPS):
        limit.observe(SIZE, LEAST_PIXELS, flat(LEAST_PIXELS), is_full=True)
        num_steps += limit.by_size[SIZE] > LEAST_PIXELS
    assert limit.by_size[SIZE] == LEAST_PIXELS
    assert num_steps == MIN_HOLD_STEPS


def test_a_budget_follows_a_device_that_changes() -> None:
    device = Device(linear(0.5))
    device.steps(200)
    assert device.learnt == MAX_PIXELS
    device.curve = worse_together(1.5)
    device.steps(1500)
    assert device.learnt == LEAST_PIXELS


@given(
    memory=st.integers(LEAST_PIXELS, 2 * MAX_PIXELS),
    curve=CURVES,
    first_pixels=st.integers(0, 2 * MAX_PIXELS),
)
@settings(max_examples=20)
def test_what_did_not_fit_is_not_tried_again_soon(memory: int, curve: Curve, first_pixels: int) -> None:
    device = Device(curve, memory_pixels=memory)
    device.limit.begin({SIZE: first_pixels})
    failed = device.steps(800)
    assert failed == sorted(set(failed), reverse=True)


def test_what_did_not_fit_is_tried_again_after_very_many_steps() -> None:
    device = Device(linear(2.0), memory_pixels=3 * LEAST_PIXELS)
    device.limit.begin({SIZE: MAX_PIXELS})
    assert device.step() == MAX_PIXELS
    device.memory_pixels = float("inf")
    device.steps(RETRY_FACTOR * MIN_WAIT_STEPS)
    assert device.limit.pixels == MAX_PIXELS - 1
    device.steps(8 * MIN_WAIT_STEPS)
    assert device.limit.pixels == MAX_PIXELS


@given(
    requests=st.lists(
        st.tuples(st.sampled_from([256, 512, 1024, 2048]), st.integers(1, 16)), min_size=1, max_size=6
    ),
    curve=CURVES,
)
@settings(max_examples=20)
def test_every_request_takes_its_steps_though_it_is_larger_than_its_budget(
    requests: list[tuple[int, int]], curve: Curve
) -> None:
    limit = StepLimit(MAX_PIXELS)
    running = {
        str(number): running_request(str(number), parameters(side, num_images))
        for number, (side, num_images) in enumerate(requests)
    }
    for _ in range(30):
        limit.know({request.size for request in running.values()})
        forward = next_forward(running, limit.pixels, limit.by_size)
        pixels = step_pixels(running, forward.claim_ids)
        note_forward(running, forward.claim_ids, curve(pixels))
        limit.observe(running[forward.claim_ids[0]].size, pixels, curve(pixels), is_full=forward.is_full)
    assert all(request.step >= 30 // len(requests) - 1 for request in running.values())


def parameters(side: int, num_images: int) -> GenerationParameters:
    return GenerationParameters(
        prompt="",
        width=side,
        height=side,
        num_inference_steps=10**9,
        guidance_scale=1.0,
        num_images=num_images,
        seed=0,
    )


def test_a_new_size_begins_with_what_the_size_most_like_it_has_learnt() -> None:
    limit = StepLimit(MAX_PIXELS)
    limit.begin({SampleSize(512, 512): LEAST_PIXELS, SIZE: 4 * LEAST_PIXELS})
    new = [SampleSize(1024, 768), SampleSize(256, 256)]
    limit.know(new)
    assert [limit.by_size[size] for size in new] == [4 * LEAST_PIXELS, LEAST_PIXELS]


def test_callers_that_ask_for_ever_new_sizes_do_not_fill_the_memory() -> None:
    limit = StepLimit(MAX_PIXELS)
    for width in range(64, 64 + 16 * 2 * MAX_SIZES, 16):
        limit.know((SampleSize(width, 64),))
    assert len(limit.learnt) == MAX_SIZES
