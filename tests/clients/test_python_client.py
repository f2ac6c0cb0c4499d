from __future__ import annotations

import asyncio
import hashlib
import io
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing, closing
from functools import partial
from typing import Any

import PIL.Image
import pytest

from hidream import events
from hidream.aio import AsyncClient
from hidream.client import Client
from hidream.errors import DeadlineExceededError, EventLoopError, InvalidArgumentError, UnavailableError
from hidream.images import Image
from hidream.v1 import server_info_pb2
from tests.support.job_calls import DEADLINES_SECONDS
from tests.support.live_server import LiveServer, wait_until

PROMPT = "a red circle on a blue background"
SMALL: dict[str, Any] = {"width": 64, "height": 64, "num_inference_steps": 3, "seed": 11}
# Longer than any test waits for, so that only cancelling can end it.
LONG: dict[str, Any] = {**SMALL, "num_inference_steps": 150, "num_images": 4}


def check_image(image: Image, width: int, height: int, file_format: str) -> None:
    assert hashlib.sha256(image.data).digest() == image.sha256
    assert (image.width, image.height) == (width, height)
    with PIL.Image.open(io.BytesIO(image.data)) as picture:
        picture.load()
        assert (picture.size, picture.format) == ((width, height), file_format)


def wait_for_one_more_cancelled_job(client: Client, num_cancelled: int) -> None:
    wait_until(lambda: client.info().jobs.cancelled > num_cancelled, 30, "the job is cancelled")


def test_an_image_has_the_size_and_format_asked_for(client: Client) -> None:
    [image] = client.draw(
        PROMPT, **{**SMALL, "width": 96, "num_inference_steps": 1}, output_format="WEBP", quality=80
    )
    check_image(image, 96, 64, "WEBP")
    assert image.mime_type == "image/webp"


def test_several_images_come_in_order_each_with_its_seed(client: Client) -> None:
    images = client.draw(PROMPT, **SMALL, num_images=3)
    for index, image in enumerate(images):
        check_image(image, 64, 64, "PNG")
        assert (image.index, image.seed) == (index, 11 + index)
    assert len({image.sha256 for image in images}) == 3


def test_an_async_client_may_be_made_where_no_event_loop_runs(server: LiveServer) -> None:
    client = AsyncClient(server.address)

    async def use() -> list[Image]:
        async with client:
            await client.wait_until_serving(30)
            return await client.draw(PROMPT, **SMALL)

    assert asyncio.run(use()) == asyncio.run(use()), "closed in one loop, it connects anew in the next"


def test_an_async_client_whose_event_loop_has_ended_connects_anew_in_the_next(server: LiveServer) -> None:
    client = AsyncClient(server.address)
    image_of = partial(client.draw, PROMPT, **SMALL)
    assert asyncio.run(image_of()) == asyncio.run(image_of()), "never closed"
    asyncio.run(client.close())
    assert asyncio.run(client.info()).jobs.failed >= 0


def test_an_async_client_says_that_it_belongs_to_another_event_loop(server: LiveServer) -> None:
    client = AsyncClient(server.address)

    async def read(stream: AsyncGenerator[Any]) -> None:
        async for _ in stream:
            pass

    calls: list[Callable[[], Coroutine[Any, Any, Any]]] = [
        client.info,
        client.health,
        partial(client.draw, PROMPT, **SMALL),
        lambda: read(client.watch("any")),
        partial(client.wait_until_serving, 30),
        client.close,
    ]
    with asyncio.Runner() as first:
        first.run(client.info())
        for call in calls:
            with pytest.raises(EventLoopError, match="connected in another event loop"):
                asyncio.run(call())
        assert first.run(client.info()).jobs.failed >= 0, "the first loop has lost nothing"
        first.run(client.close())
        first.run(client.close())


async def test_the_same_seed_gives_the_same_bytes_through_both_clients(server: LiveServer) -> None:
    async with AsyncClient(server.address) as async_client:
        [first] = await async_client.draw(PROMPT, **SMALL)
        [again] = await async_client.draw(PROMPT, **SMALL)

    def draw() -> list[Image]:
        with Client(server.address) as client:
            return client.draw(PROMPT, **SMALL)

    [elsewhere] = await asyncio.to_thread(draw)
    check_image(first, 64, 64, "PNG")
    assert first == again == elsewhere


def check_story(story: list[events.Event]) -> None:
    """Queued, started, every step, the image, the end: in this order."""
    assert isinstance(story[0], events.Queued)
    started = next(event for event in story if isinstance(event, events.Started))
    assert started.spec.seed == 11
    steps = [event for event in story if isinstance(event, events.Progress)]
    assert [(step.step, step.total_steps) for step in steps] == [(1, 3), (2, 3), (3, 3)]
    assert all(step.step_seconds > 0 for step in steps)
    assert [type(event) for event in story[-2:]] == [events.ImageFinished, events.Succeeded]
    assert story.index(started) < story.index(steps[0])
    sequences = [event.sequence for event in story]
    assert sequences == sorted(set(sequences))
    assert len({event.job_id for event in story}) == 1
    timings = story[-1].timings  # type: ignore[union-attr]
    assert timings.denoise_seconds <= timings.total_seconds
    assert sum(step.step_seconds for step in steps) <= timings.total_seconds


def test_events_tell_every_step(client: Client) -> None:
    check_story(list(client.generate(PROMPT, **SMALL)))


async def test_events_tell_every_step_to_asyncio_too(server: LiveServer) -> None:
    async with AsyncClient(server.address) as client:
        check_story([event async for event in client.generate(PROMPT, **SMALL)])


def test_previews_are_small_images_of_each_step(client: Client) -> None:
    previews = [
        event for event in client.generate(PROMPT, **SMALL, preview=True) if isinstance(event, events.Preview)
    ]
    assert previews
    for preview in previews:
        with PIL.Image.open(io.BytesIO(preview.data)) as picture:
            assert picture.format == "JPEG"


def test_closing_the_events_cancels_the_job(server: LiveServer, client: Client) -> None:
    num_cancelled = client.info().jobs.cancelled
    with closing(client.generate(PROMPT, **LONG)) as stream:
        next(event for event in stream if isinstance(event, events.Progress))
    wait_for_one_more_cancelled_job(client, num_cancelled)
    server.wait_until_idle()


async def test_closing_the_events_cancels_the_job_for_asyncio_too(server: LiveServer) -> None:
    num_cancelled = server.info().jobs.cancelled
    async with AsyncClient(server.address) as client:
        async with aclosing(client.generate(PROMPT, **LONG)) as stream:
            async for event in stream:
                if isinstance(event, events.Progress):
                    break
        with Client(server.address) as watching:
            await asyncio.to_thread(wait_for_one_more_cancelled_job, watching, num_cancelled)


async def test_cancelling_the_task_that_draws_cancels_the_job(server: LiveServer) -> None:
    num_cancelled = server.info().jobs.cancelled
    has_started = asyncio.Event()

    async def draw(client: AsyncClient) -> None:
        async for event in client.generate(PROMPT, **LONG):
            if isinstance(event, events.Progress):
                has_started.set()

    async with AsyncClient(server.address) as client:
        drawing = asyncio.create_task(draw(client))
        await has_started.wait()
        drawing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await drawing
        with Client(server.address) as watching:
            await asyncio.to_thread(wait_for_one_more_cancelled_job, watching, num_cancelled)


def test_the_deadline_ends_the_call_and_the_job(client: Client) -> None:
    num_cancelled = client.info().jobs.cancelled
    for seconds in DEADLINES_SECONDS:
        num_accepted = client.info().jobs.total
        with pytest.raises(DeadlineExceededError):
            # Of a size that was never measured: otherwise it may be refused at once.
            client.draw(PROMPT, **{**LONG, "width": 528, "height": 512}, timeout_seconds=seconds)
        if client.info().jobs.total > num_accepted:
            break
    wait_for_one_more_cancelled_job(client, num_cancelled)


BAD: dict[str, Any] = {"width": 65, "height": 64, "num_inference_steps": 0, "seed": -1, "quality": 80}
BAD_FIELDS = ["spec.num_inference_steps", "spec.prompt", "spec.quality", "spec.seed", "spec.width"]


def test_every_bad_field_is_named_at_once(client: Client) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        client.draw("", **BAD)
    assert sorted(violation.field for violation in caught.value.violations) == BAD_FIELDS
    assert all(violation.description for violation in caught.value.violations)


async def test_every_bad_field_is_named_at_once_to_asyncio_too(server: LiveServer) -> None:
    async with AsyncClient(server.address) as client:
        with pytest.raises(InvalidArgumentError) as caught:
            await client.draw("", **BAD)
    assert sorted(violation.field for violation in caught.value.violations) == BAD_FIELDS


async def test_both_clients_describe_the_server(server: LiveServer, client: Client) -> None:
    info = client.info()
    assert info.state == server_info_pb2.SERVER_STATE_SERVING
    assert info.model.name == "demo"
    async with AsyncClient(server.address) as async_client:
        assert (await async_client.info()).limits == info.limits


def test_an_address_where_nobody_listens_is_unavailable(closed_address: str) -> None:
    with Client(closed_address) as client, pytest.raises(UnavailableError):
        client.info()
