from __future__ import annotations

import asyncio
import shlex
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from hidream.aio import AsyncClient
from hidream.client import Client
from hidream.errors import ServerError, UnavailableError
from hidream.events import ImageFinished, Started
from hidream.reconnecting import ReconnectPolicy
from hidream.watching import MAX_RECONNECT_WINDOW_SECONDS
from tests.clients.breaking_server import FILE, JOB_ID, BreakingImageGen, breaking_image_gen, serving
from tests.clients.either_client import EitherClient
from tests.clients.test_hidream_command import hidream
from tests.clients.test_reconnecting import KINDS, NUM_EVENTS


@pytest.fixture(params=[False, True], ids=["sync", "asyncio"])
def is_async(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def server() -> Iterator[tuple[BreakingImageGen, str]]:
    servicer = breaking_image_gen()
    with serving(servicer) as address:
        yield servicer, address


@pytest.fixture
def either(server: tuple[BreakingImageGen, str], is_async: bool) -> EitherClient:
    return EitherClient(is_async, server[1])


def test_a_generation_that_breaks_anywhere_follows_the_same_job_and_gets_nothing_twice(
    server: tuple[BreakingImageGen, str], either: EitherClient
) -> None:
    servicer = server[0]
    for num_sent in range(1, NUM_EVENTS):
        servicer.breaks = [num_sent]
        servicer.generated.clear()
        events = either.items("generate", "a")
        assert [type(event).__name__ for event in events] == KINDS, f"broken after {num_sent}"
        [image] = [event.image.data for event in events if isinstance(event, ImageFinished)]
        assert image == FILE
        first, again = servicer.generated
        assert first == again
        assert first.request_id
        assert first.reconnect_window.ToTimedelta().total_seconds() == MAX_RECONNECT_WINDOW_SECONDS
    assert servicer.cancelled == []


def test_a_drawing_that_breaks_brings_its_images(
    server: tuple[BreakingImageGen, str], is_async: bool
) -> None:
    servicer, address = server
    servicer.breaks = [7, 1]
    if is_async:

        async def draw() -> list[bytes]:
            async with AsyncClient(address) as client:
                return [image.data for image in await client.draw("a")]

        assert asyncio.run(draw()) == [FILE]
    else:
        with Client(address) as client:
            assert [image.data for image in client.draw("a")] == [FILE]


def test_a_job_that_was_given_up_meanwhile_is_followed_anew(
    server: tuple[BreakingImageGen, str], either: EitherClient
) -> None:
    server[0].breaks, server[0].job_ids = [3], ["given-up"]
    events = either.items("generate", "a")
    assert [event.job_id for event in events if isinstance(event, Started)] == ["given-up", JOB_ID]
    assert [type(event).__name__ for event in events if event.job_id == JOB_ID] == KINDS


def test_a_generation_that_gets_no_answer_for_too_long_names_its_job(
    server: tuple[BreakingImageGen, str], either: EitherClient
) -> None:
    server[0].breaks = [2, *[0] * 1000]
    told: list[ServerError] = []
    policy = ReconnectPolicy(reconnect_seconds=0.3, on_connection_lost=told.append)
    with pytest.raises(UnavailableError) as lost:
        either.items("generate", "a", policy=policy)
    request_id = server[0].generated[0].request_id
    assert str(lost.value) == f"the server is going away (job {JOB_ID}, request id {request_id})"
    for error in (lost.value, *told):
        assert (error.followed_job_id, error.followed_request_id) == (JOB_ID, request_id)
        assert error.held_seconds == pytest.approx(0.3)
    assert lost.value.message == "the server is going away"
    assert server[0].cancelled == []


def test_a_first_call_that_is_not_answered_is_not_repeated(
    server: tuple[BreakingImageGen, str], either: EitherClient
) -> None:
    server[0].breaks = [0]
    with pytest.raises(UnavailableError):
        either.items("generate", "a")
    assert len(server[0].generated) == 1


@pytest.mark.parametrize(
    ("options", "stopped"),
    [({}, [JOB_ID]), ({"request_id": "named"}, []), ({"detached": True}, [])],
    ids=["its own", "one that others may wait for", "detached"],
)
def test_leaving_early_stops_the_job(
    options: dict[str, object], stopped: list[str], server: tuple[BreakingImageGen, str]
) -> None:
    servicer, address = server
    with Client(address) as client, closing(client.generate("a", **options)) as events:  # type: ignore[arg-type]
        next(events)
    assert servicer.cancelled == stopped
    assert servicer.generated[0].HasField("reconnect_window") == bool(stopped)


@pytest.mark.parametrize("is_client_closed", [False, True], ids=["events", "client"])
def test_leaving_while_the_connection_is_lost_stops_no_job(
    is_client_closed: bool, server: tuple[BreakingImageGen, str]
) -> None:
    servicer, address = server
    servicer.breaks = [3, 0]
    with Client(address) as client:

        def leave(_: ServerError) -> None:
            if is_client_closed:
                client.close()
            raise KeyboardInterrupt

        events = client.generate("a", policy=ReconnectPolicy(on_connection_lost=leave))
        with pytest.raises(KeyboardInterrupt), closing(events):
            list(events)
    assert servicer.cancelled == []


def test_a_job_that_was_given_up_is_not_stopped_in_place_of_the_new_one(
    server: tuple[BreakingImageGen, str],
) -> None:
    servicer, address = server
    servicer.breaks, servicer.job_ids = [2], ["given-up"]
    with Client(address) as client, closing(client.generate("a")) as events:
        while next(events).job_id != JOB_ID:
            pass
    assert servicer.cancelled == [JOB_ID]


def test_closing_the_client_stops_the_jobs_that_it_follows(server: tuple[BreakingImageGen, str]) -> None:
    client = Client(server[1])
    events = client.generate("a")
    next(events)
    client.close()
    assert server[0].cancelled == [JOB_ID]
    events.close()
    assert server[0].cancelled == [JOB_ID]


async def test_a_task_that_is_cancelled_stops_its_job(server: tuple[BreakingImageGen, str]) -> None:
    has_begun = asyncio.Event()

    async def follow(client: AsyncClient) -> None:
        async for _ in client.generate("a"):
            has_begun.set()
            await asyncio.Event().wait()

    async with AsyncClient(server[1]) as client:
        task = asyncio.create_task(follow(client))
        await has_begun.wait()
        task.cancel()
        await asyncio.wait([task])
    # Said twice where the client is closed before the first answer.
    assert set(server[0].cancelled) == {JOB_ID}


def test_the_command_goes_on_after_a_break_and_says_how_else_to(
    server: tuple[BreakingImageGen, str], tmp_path: Path
) -> None:
    servicer, address = server
    servicer.breaks = [3, 0]
    result = hidream(address, "generate", "a", "--out", "a fox.png", folder=tmp_path)
    assert (result.returncode, result.stdout) == (0, "a fox.png\n"), result.stderr
    assert (tmp_path / "a fox.png").read_bytes() == FILE
    told = f"to go on with job {JOB_ID}: the same command with --request-id "
    shown = result.stderr
    assert shown.index("step 1 of 3") < shown.index(told) < shown.index("step 2 of 3")

    servicer.breaks = [2, *[0] * 1000]
    arguments = ("generate", "a", "--reconnect", "0.3", "--out", "a fox.png")
    result = hidream(address, *arguments, folder=tmp_path)
    assert result.returncode == 3
    request_id = servicer.generated[-1].request_id
    assert result.stderr.splitlines()[-1] == (
        f"hidream: {address}: the server is going away; {told}{request_id} (after 0.3 s it may start anew)"
    )

    servicer.breaks = [2, *[0] * 1000]
    result = hidream(address, *arguments, "--detach", folder=tmp_path)
    going_on = f"hidream watch {JOB_ID} --out 'a fox.png' --address {address}"
    assert result.stderr.splitlines()[-1].endswith(f"; to go on with job {JOB_ID}: {going_on}")

    servicer.breaks.clear()
    (tmp_path / "a fox.png").unlink()
    assert hidream(address, *shlex.split(going_on)[1:-2], folder=tmp_path).returncode == 0
    assert (tmp_path / "a fox.png").read_bytes() == FILE
