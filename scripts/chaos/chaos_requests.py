"""What callers ask for while ranks die, and whether they get it."""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from PIL import Image as ImageFile

from hidream.client import Client
from hidream.errors import HiDreamError
from hidream.events import Event, ImageFinished, Progress, Restarted, Succeeded

REQUEST_TIMEOUT_SECONDS = 180.0

PIXEL_TOLERANCE = 1
"""Largest difference of a value, of 255. A batch of other company moves latents by at most 2e-5
(tests/numerics/test_batching.py), which decodes to far less than one level: a value may be rounded the other
way, and no more."""


@dataclass(frozen=True, slots=True)
class ChaosRequest:
    """A prompt and the options of its image."""

    prompt: str
    options: dict[str, Any]


def _request(
    prompt: str, width: int, height: int, num_steps: int, guidance: float, num_images: int
) -> ChaosRequest:
    options: dict[str, Any] = {
        "width": width,
        "height": height,
        "num_inference_steps": num_steps,
        "guidance_scale": guidance,
        "num_images": num_images,
        "seed": width + num_steps,
    }
    return ChaosRequest(prompt, options)


REQUESTS = (
    _request("a red circle on a blue background", 64, 64, 8, 3.0, 1),
    _request("two green squares", 128, 128, 24, 3.0, 2),
    _request("a yellow star", 96, 64, 14, 1.0, 3),
    _request("a blue triangle on a white background", 64, 128, 40, 4.0, 1),
    _request("a purple circle", 128, 128, 16, 1.0, 1),
)
"""Short and long, with and without guidance, one image and several, of one size and of others."""


@dataclass
class Followed:
    """What the stream of one request brought.

    Attributes:
        num_restarts: times that the ranks were lost under it.
        num_steps_lost: steps that it was told of and that were taken again.
        images: its files, in order; empty when it failed.
        faults: what a caller must never see.
    """

    num_restarts: int = 0
    num_steps_lost: int = 0
    images: list[bytes] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def follow(client: Client, request: ChaosRequest, on_event: Callable[[Event], None]) -> Followed:
    """Generate the images and check every event against the contract."""
    followed = Followed()
    images: dict[int, bytes] = {}
    events: list[Event] = []
    try:
        for event in client.generate(
            request.prompt, timeout_seconds=REQUEST_TIMEOUT_SECONDS, **request.options
        ):
            on_event(event)
            events.append(event)
            if isinstance(event, ImageFinished):
                images[event.image.index] = event.image.data
    except HiDreamError as error:
        followed.faults.append(f"ended with {type(error).__name__}: {error}")
        return followed
    followed.images = [images[index] for index in sorted(images)]
    _check(events, request, followed)
    return followed


def _check(events: list[Event], request: ChaosRequest, followed: Followed) -> None:
    if any(after.sequence <= before.sequence for before, after in pairwise(events)):
        followed.faults.append("sequences do not grow")
    step, attempt, told = 0, 1, 0
    for event in events:
        match event:
            case Progress():
                if event.step <= step:
                    followed.faults.append(f"step {event.step} came after step {step} of attempt {attempt}")
                step, told = event.step, max(told, event.step)
            case Restarted():
                if event.attempt <= attempt:
                    followed.faults.append(f"attempt {event.attempt} came after attempt {attempt}")
                attempt = event.attempt
                followed.num_restarts += 1
                followed.num_steps_lost += max(0, step - event.resumed_from_step)
                step = event.resumed_from_step
    last = events[-1]
    if not isinstance(last, Succeeded):
        followed.faults.append(f"the last event is {type(last).__name__}")
    elif last.job.execution.attempt != attempt:
        followed.faults.append(f"attempt {last.job.execution.attempt} at the end, {attempt} before")
    if told != request.options["num_inference_steps"]:
        followed.faults.append(f"the last step that was told of is {told}")
    if len(followed.images) != request.options["num_images"]:
        followed.faults.append(f"{len(followed.images)} images")


class References:
    """The images of requests that nothing disturbed, each alone.

    Args:
        images: of each request.
    """

    def __init__(self, images: Mapping[int, list[bytes]]) -> None:
        self._images = images

    def differences(self, number: int, images: list[bytes], *, was_alone: bool) -> list[str]:
        """What is wrong with the images of a request; to the byte if it ran alone."""
        expected = self._images[number]
        if images == expected:
            return []
        largest = max(map(largest_difference, images, expected), default=255)
        if was_alone:
            return [f"request {number}, alone: other bytes, pixels differ by up to {largest}"]
        if largest > PIXEL_TOLERANCE:
            return [f"request {number}, in company: pixels differ by up to {largest}"]
        return []


def pick(choices: random.Random) -> int:
    """Choose the number of a request."""
    return choices.randrange(len(REQUESTS))


def largest_difference(file: bytes, expected_file: bytes) -> int:
    """The largest difference between values of two images, from 0 to 255."""
    pixels, expected = (
        np.asarray(ImageFile.open(io.BytesIO(data)), dtype=np.int16) for data in (file, expected_file)
    )
    return int(np.abs(pixels - expected).max()) if pixels.shape == expected.shape else 255
