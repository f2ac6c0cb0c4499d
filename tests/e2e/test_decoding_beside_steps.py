"""A large image is decoded between the steps of other requests: counted in steps, on real ranks."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Collection
from contextlib import suppress

import pytest
import pytest_asyncio
from diffusers import AutoencoderKL

from hidream_grpc.engine.controller import Controller
from hidream_grpc.engine.group.rank_group import RankGroup
from hidream_grpc.engine.protocol.messages import Decode, DecodedImage, JobFault
from hidream_grpc.engine.requests import (
    EngineEvent,
    EngineRequest,
    EngineState,
    ImageFinished,
    RequestFinished,
    StepFinished,
)
from hidream_grpc.engine.step_limit import StepLimit
from hidream_grpc.engine.step_limit_file import StepLimitFile
from hidream_grpc.model.checkpoint.demo import demo_checkpoint_path
from hidream_grpc.model.decoding.vae import ImageDecoding
from hidream_grpc.model.parameters import GenerationParameters, SampleSize
from tests.support.autoencoders import latents_of
from tests.support.rank_groups import (
    admission,
    decode,
    draw,
    group_config,
    little_memory,
    no_memory_kept,
    picture,
    plan,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")

LARGE = picture(width=256, height=256, num_inference_steps=1, guidance_scale=1.0)
LARGER = picture(width=512, height=512, num_inference_steps=1, guidance_scale=1.0)
SMALL = picture(num_inference_steps=1000, guidance_scale=1.0)
NO_TIME = 0.0
"""A budget of time: one slice in every round."""
LESS_THAN_A_SLICE_BYTES = 16 * 1024 * 1024
"""The largest tensors of a 512×512 decode are twice as large."""


@pytest.fixture(scope="module")
def num_slices() -> int:
    """Slices of the demo model's decoder, for "large"."""
    vae = AutoencoderKL.from_pretrained(demo_checkpoint_path() / "vae", local_files_only=True)
    decoding = ImageDecoding(vae, latents_of(vae, (LARGE.height // 8, LARGE.width // 8)))
    num_slices = 0
    while not decoding.is_finished:
        decoding.advance()
        num_slices += 1
    return num_slices


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def group() -> AsyncIterator[RankGroup]:
    """Two ranks; each test leaves them without a request."""
    with no_memory_kept():
        group = RankGroup(group_config(2))
        await group.start()
        yield group
        await group.stop()


@pytest_asyncio.fixture(loop_scope="module")
async def denoised(group: RankGroup) -> AsyncIterator[None]:
    """Two requests: "large" has taken all its steps, "small" has a thousand."""
    admissions = (admission("large", LARGE), admission("small", SMALL))
    await group.execute(plan(admissions=admissions, step_claims=("large",)))
    yield
    await group.execute(plan(releases=("large", "small")))


async def step_and_decode(group: RankGroup, *decodes: Decode) -> tuple[DecodedImage, ...]:
    """One step of "small", and one slice of each image that a rank is at; the images that are finished."""
    answers = await group.execute(
        plan(step_claims=("small",), decodes=decodes, decode_budget_seconds=NO_TIME)
    )
    assert not any(answer.faults for answer in answers)
    return tuple(image for answer in answers for image in answer.images)


@pytest.mark.usefixtures("denoised")
async def test_another_request_takes_a_step_after_every_slice_and_the_image_is_the_same(
    group: RankGroup, num_slices: int
) -> None:
    in_one_piece = await decode(group, "large", rank=1)
    images = await step_and_decode(group, Decode(claim_id="large", image_index=0, rank=0))
    num_steps = 1
    while not images:
        images = await step_and_decode(group)
        num_steps += 1
    assert num_steps >= num_slices
    (image,) = images
    assert image.data == in_one_piece.data
    assert image.decode_seconds > 0


@pytest.mark.usefixtures("denoised")
@pytest.mark.long
async def test_ranks_decode_an_image_each_at_the_same_time(group: RankGroup) -> None:
    expected = (await decode(group, "large")).data
    images = list(
        await step_and_decode(
            group, *(Decode(claim_id="large", image_index=0, rank=rank) for rank in range(group.world_size))
        )
    )
    assert not images
    while len(images) < group.world_size:
        images.extend(await step_and_decode(group))
    assert [image.data for image in images] == [expected] * group.world_size


@pytest.mark.usefixtures("denoised")
async def test_a_released_request_leaves_its_rank_free_in_the_same_plan(group: RankGroup) -> None:
    undisturbed = await draw(group, picture(num_inference_steps=1))
    await group.execute(
        plan(admissions=(admission("next", picture(num_inference_steps=1)),), step_claims=("next",))
    )
    assert not await step_and_decode(group, Decode(claim_id="large", image_index=0, rank=0))
    answers = await group.execute(
        plan(releases=("large",), decodes=(Decode(claim_id="next", image_index=0, rank=0),))
    )
    (image,) = answers[0].images
    assert (image.claim_id, image.data) == ("next", undisturbed)
    await group.execute(plan(releases=("next",)))


@pytest.mark.usefixtures("denoised")
async def test_an_image_that_fails_halfway_fails_its_job_alone_and_frees_its_rank(group: RankGroup) -> None:
    await group.execute(plan(admissions=(admission("larger", LARGER),), step_claims=("larger",)))
    # The memory that a rank takes at its first image is no part of what it lacks at the next.
    expected = (await decode(group, "larger", rank=1)).data
    pids, generation = group.rank_pids, group.generation
    assert not await step_and_decode(group, Decode(claim_id="larger", image_index=0, rank=1))
    faults: list[JobFault] = []
    with little_memory(pids[1], spare_bytes=LESS_THAN_A_SLICE_BYTES):
        while not faults:
            answers = await group.execute(plan(decode_budget_seconds=NO_TIME))
            assert not any(answer.images for answer in answers)
            faults = [fault for answer in answers for fault in answer.faults]
    assert [(fault.claim_id, fault.kind) for fault in faults] == [("larger", "OutOfDeviceMemoryError")]
    assert (await decode(group, "larger", rank=1)).data == expected
    assert (group.rank_pids, group.generation) == (pids, generation)
    await group.execute(plan(releases=("larger",)))


class TwoRequests:
    """A backlog of two requests, and what the controller tells about them."""

    def __init__(self) -> None:
        self.events: list[tuple[str, EngineEvent]] = []
        self.large_has_ended = asyncio.Event()
        self._waiting = deque((self._request("large", LARGER), self._request("small", SMALL)))

    waiting_sizes: Collection[SampleSize] = ()

    def take(self) -> EngineRequest | None:
        return self._waiting.popleft() if self._waiting else None

    def set_engine_state(self, state: EngineState) -> None:
        pass

    def _request(self, job_id: str, parameters: GenerationParameters) -> EngineRequest:
        return EngineRequest(job_id, job_id, "", parameters, lambda event: self._note(job_id, event))

    def _note(self, job_id: str, event: EngineEvent) -> None:
        self.events.append((job_id, event))
        if job_id == "large" and isinstance(event, RequestFinished):
            self.large_has_ended.set()


@pytest.mark.long
async def test_the_controller_keeps_a_request_stepping_while_another_ones_large_image_is_decoded() -> None:
    requests = TwoRequests()
    controller = Controller(
        RankGroup(group_config(1)),
        StepLimit(2**40),
        StepLimitFile(None),
        step_observers=(),
        prompt_observers=(),
    )
    running = asyncio.create_task(controller.run(requests))
    await requests.large_has_ended.wait()
    running.cancel()
    with suppress(asyncio.CancelledError):
        await running

    kinds = [(job_id, type(event)) for job_id, event in requests.events]
    decoding = kinds[kinds.index(("large", StepFinished)) : kinds.index(("large", ImageFinished))]
    # The whole decoder takes the time of a hundred of these steps.
    assert decoding.count(("small", StepFinished)) >= 5
