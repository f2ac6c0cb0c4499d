"""What a caller of `Generate` relies on, against the real server with real ranks."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator

import grpc
import numpy as np
import pytest
from google.protobuf.json_format import ParseDict
from PIL import Image

from hidream.v1 import image_gen_pb2, image_gen_pb2_grpc, image_pb2, job_pb2
from tests.support.job_calls import wait_for_state
from tests.support.live_server import LiveServer, wait_until
from tests.support.streams import follow, grow_to, is_progress, read_until, request


def test_a_stream_tells_every_stage_in_order_and_ends_with_the_image(
    stub: image_gen_pb2_grpc.ImageGenStub,
) -> None:
    stream = follow(stub.Generate(request("a red circle", num_inference_steps=6)))
    assert stream.kinds == [
        "queued",
        "started",
        *["progress"] * len(stream.steps),
        *["image_chunk"] * len(stream.of_kind("image_chunk")),
        "succeeded",
    ]
    assert grow_to(stream.steps, 6)
    assert stream.events[0].queued.queue_position == 1
    assert len({response.job_id for response in stream.responses}) == 1


def test_progress_counts_every_step_with_its_measured_duration(
    stub: image_gen_pb2_grpc.ImageGenStub,
) -> None:
    stream = follow(stub.Generate(request(num_inference_steps=10)))
    assert grow_to(stream.steps, 10)
    progress = [event.progress for event in stream.of_kind("progress")]
    assert {p.total_steps for p in progress} == {10}
    assert all(p.step_duration.ToNanoseconds() > 0 for p in progress)
    # The first step of a server is the first that it measures.
    remaining = [
        p.estimated_remaining.ToNanoseconds() for p in progress[1:] if p.HasField("estimated_remaining")
    ]
    assert len(remaining) == len(progress) - 1
    assert remaining[-1] < remaining[0]


def test_sequences_only_grow(stub: image_gen_pb2_grpc.ImageGenStub) -> None:
    stream = follow(stub.Generate(request(preview=True, num_inference_steps=4)))
    sequences = [event.sequence for event in stream.events]
    assert sequences == sorted(set(sequences))


def test_the_job_says_what_was_really_done_and_how_long_each_stage_took(
    stub: image_gen_pb2_grpc.ImageGenStub, server: LiveServer
) -> None:
    job = follow(stub.Generate(request("a red circle", num_inference_steps=3, seed=11))).job
    info = server.info()
    assert job.state == job_pb2.JOB_STATE_SUCCEEDED
    assert (job.spec.width, job.spec.height) == (128, 128)
    assert job.spec.guidance_scale == pytest.approx(info.defaults.guidance_scale)
    assert (job.spec.num_images, job.spec.seed) == (1, 11)
    assert job.execution.scheduler == "UniPCMultistepScheduler"
    assert (job.execution.layout, job.execution.attempt) == (info.layout, 1)
    timings = job.timings
    stages = [timings.encode, timings.denoise, timings.decode]
    assert all(stage.ToNanoseconds() > 0 for stage in stages)
    assert timings.total.ToNanoseconds() >= timings.denoise.ToNanoseconds()


def test_the_image_has_the_size_format_and_checksum_that_the_stream_says(
    stub: image_gen_pb2_grpc.ImageGenStub,
) -> None:
    stream = follow(stub.Generate(request(num_inference_steps=2)))
    (data,) = stream.images
    (info,) = stream.job.images
    assert (info.size_bytes, info.sha256) == (len(data), hashlib.sha256(data).digest())
    assert info.mime_type == "image/png"
    with Image.open(io.BytesIO(data)) as image:
        assert (image.format, image.size, image.mode) == ("PNG", (128, 128), "RGB")


@pytest.mark.parametrize("size", [(256, 256), (128, 192), (320, 64)], ids=lambda size: f"{size[0]}x{size[1]}")
def test_the_size_asked_for_is_the_size_returned(
    stub: image_gen_pb2_grpc.ImageGenStub, size: tuple[int, int]
) -> None:
    width, height = size
    stream = follow(stub.Generate(request(width=width, height=height, num_inference_steps=1)))
    with Image.open(io.BytesIO(stream.images[0])) as image:
        assert image.size == size


@pytest.mark.parametrize(
    ("output_format", "name"),
    [(image_pb2.OUTPUT_FORMAT_JPEG, "JPEG"), (image_pb2.OUTPUT_FORMAT_WEBP, "WEBP")],
    ids=["jpeg", "webp"],
)
def test_lossy_formats_grow_with_their_quality(
    stub: image_gen_pb2_grpc.ImageGenStub, output_format: image_pb2.OutputFormat.ValueType, name: str
) -> None:
    sizes = []
    for quality in (10, 95):
        generate = request(output_format=output_format, quality=quality, num_inference_steps=2)
        (data,) = follow(stub.Generate(generate)).images
        with Image.open(io.BytesIO(data)) as image:
            assert image.format == name
        sizes.append(len(data))
    assert sizes[0] < sizes[1]


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(
    stub: image_gen_pb2_grpc.ImageGenStub,
) -> None:
    first, again, other = (
        follow(stub.Generate(request(seed=seed, num_inference_steps=3))).images for seed in (5, 5, 6)
    )
    assert first == again != other


def test_an_image_says_which_request_draws_it_again(stub: image_gen_pb2_grpc.ImageGenStub) -> None:
    drawn = follow(stub.Generate(request("红 circle", seed=20, num_inference_steps=2)))
    with Image.open(io.BytesIO(drawn.images[0])) as image:
        said = json.loads(image.info["hidream"])
        assert b"trainedAlgorithmicMedia" in image.info["xmp"]
    execution = drawn.job.execution
    assert ParseDict(said["execution"], job_pb2.Execution()) == job_pb2.Execution(
        model=execution.model, scheduler=execution.scheduler, shift=execution.shift
    )
    again = image_gen_pb2.GenerateRequest(spec=ParseDict(said["spec"], image_pb2.ImageSpec()))
    assert again.spec.seed == 20
    assert follow(stub.Generate(again)).images == drawn.images


def test_a_request_without_seed_says_the_seed_that_draws_it_again(
    stub: image_gen_pb2_grpc.ImageGenStub,
) -> None:
    unseeded = request(num_inference_steps=2)
    unseeded.spec.ClearField("seed")
    first, second = (follow(stub.Generate(unseeded)) for _ in range(2))
    assert first.job.spec.seed != second.job.spec.seed
    again = follow(stub.Generate(request(num_inference_steps=2, seed=first.job.spec.seed)))
    assert again.images == first.images


def test_image_i_is_the_image_that_seed_plus_i_draws_alone(
    stub: image_gen_pb2_grpc.ImageGenStub,
) -> None:
    together = follow(stub.Generate(request(seed=20, num_images=3, num_inference_steps=3)))
    assert [image.seed for image in together.job.images] == [20, 21, 22]
    alone = follow(stub.Generate(request(seed=22, num_inference_steps=3)))
    difference = np.abs(pixels(together.images[2]) - pixels(alone.images[0]))
    # Other batch sizes round differently in float32; measured at most 1 of 255.
    assert difference.max() <= 2


def test_the_negative_prompt_and_the_guidance_scale_change_the_image(
    stub: image_gen_pb2_grpc.ImageGenStub,
) -> None:
    plain, negative, strong, unguided = (
        follow(
            stub.Generate(request("a red circle", width=64, height=64, num_inference_steps=2, **changes))
        ).images[0]
        for changes in ({}, {"negative_prompt": "blue"}, {"guidance_scale": 7.0}, {"guidance_scale": 1.0})
    )
    assert len({plain, negative, strong, unguided}) == 4


def test_previews_come_on_demand_after_steps_and_look_like_the_image(
    stub: image_gen_pb2_grpc.ImageGenStub, server: LiveServer
) -> None:
    stream = follow(stub.Generate(request("a red circle", preview=True, num_inference_steps=8, seed=1)))
    previews = [event.preview for event in stream.of_kind("preview")]
    assert grow_to([preview.step for preview in previews], 8)
    with Image.open(io.BytesIO(previews[-1].data)) as preview:
        assert max(preview.size) <= server.info().limits.max_preview_side_pixels
        small = pixels(stream.images[0], preview.size)
        seen = np.asarray(preview.convert("RGB"), dtype=np.float64)
    assert np.corrcoef(small.ravel(), seen.ravel())[0, 1] > 0.9
    assert not follow(stub.Generate(request(num_inference_steps=2))).of_kind("preview")


@pytest.mark.long
def test_a_plain_stub_receives_two_images_of_1024_by_1024_in_chunks(
    stub: image_gen_pb2_grpc.ImageGenStub,
) -> None:
    stream = follow(
        stub.Generate(
            request(width=1024, height=1024, num_images=2, num_inference_steps=1, guidance_scale=1.0)
        )
    )
    assert len(stream.images) == 2
    assert len(stream.of_kind("image_chunk")) > 2
    for data, info in zip(stream.images, stream.job.images, strict=True):
        assert hashlib.sha256(data).digest() == info.sha256
        with Image.open(io.BytesIO(data)) as image:
            assert image.size == (1024, 1024)


def test_a_cancelled_call_stops_its_job_at_the_next_step(
    stub: image_gen_pb2_grpc.ImageGenStub, server: LiveServer
) -> None:
    call = stub.Generate(request(num_inference_steps=150, width=512, height=512))
    job_id = read_until(call, is_progress)[-1].job_id
    call.cancel()
    wait_for_state(stub, job_id, job_pb2.JOB_STATE_CANCELLED)
    server.wait_until_idle()


def test_a_detached_job_goes_on_when_its_caller_leaves(
    stub: image_gen_pb2_grpc.ImageGenStub, server: LiveServer
) -> None:
    call = stub.Generate(request(num_inference_steps=10, detached=True))
    job_id = read_until(call, lambda event: event.HasField("started"))[-1].job_id
    call.cancel()
    wait_for_state(stub, job_id, job_pb2.JOB_STATE_SUCCEEDED)


def test_a_deadline_stops_the_job_and_is_told_as_such(
    stub: image_gen_pb2_grpc.ImageGenStub, server: LiveServer
) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.Generate(request(num_inference_steps=150, width=512, height=512), timeout=1.0))
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    wait_until(lambda: server.info().jobs.running == 0, 20, "the job has stopped")


def test_a_request_id_follows_its_job_instead_of_drawing_twice(
    stub: image_gen_pb2_grpc.ImageGenStub, server: LiveServer
) -> None:
    generate = request(num_inference_steps=3, request_id="once-only")
    first = follow(stub.Generate(generate))
    total = server.info().jobs.total
    second = follow(stub.Generate(generate))
    assert second.job.job_id == first.job.job_id
    assert second.images == first.images
    assert server.info().jobs.total == total


def test_a_request_id_with_another_request_is_refused(stub: image_gen_pb2_grpc.ImageGenStub) -> None:
    follow(stub.Generate(request(num_inference_steps=1, request_id="taken")))
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.Generate(request(num_inference_steps=2, request_id="taken")))
    assert caught.value.code() == grpc.StatusCode.ALREADY_EXISTS


def test_a_request_runs_beside_a_long_one_and_ends_before_it(
    stub: image_gen_pb2_grpc.ImageGenStub,
) -> None:
    long_call = stub.Generate(request(num_inference_steps=150, seed=1))
    wait_for_progress(long_call)
    short = follow(stub.Generate(request(num_inference_steps=4, seed=2)))
    assert short.job.state == job_pb2.JOB_STATE_SUCCEEDED
    step = wait_for_progress(long_call)
    assert step < 150
    long_call.cancel()


def test_requests_of_other_sizes_take_turns(stub: image_gen_pb2_grpc.ImageGenStub) -> None:
    calls = [
        stub.Generate(request(num_inference_steps=100, width=side, height=side)) for side in (64, 128, 192)
    ]
    steps = [wait_for_progress(call) for call in calls]
    further = [wait_for_progress(call) for call in calls]
    assert all(after > before for before, after in zip(steps, further, strict=True))
    for call in calls:
        call.cancel()


def pixels(data: bytes, size: tuple[int, int] | None = None) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        small = (
            image.convert("RGB") if size is None else image.convert("RGB").resize(size, Image.Resampling.BOX)
        )
        return np.asarray(small, dtype=np.float64)


def wait_for_progress(call: Iterator[image_gen_pb2.GenerateResponse]) -> int:
    """Read a stream up to its next step."""
    return read_until(call, is_progress)[-1].event.progress.step
