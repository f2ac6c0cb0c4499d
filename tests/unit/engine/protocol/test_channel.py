from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hidream_grpc.engine.protocol import channel as channel_module
from hidream_grpc.engine.protocol.channel import (
    MAX_FRAME_BYTES,
    AsyncChannel,
    BlockingChannel,
    FrameError,
    MessageDecoder,
    encode_frame,
)
from hidream_grpc.engine.protocol.messages import (
    Admission,
    Command,
    Decode,
    DecodedImage,
    Event,
    GroupBroken,
    Hello,
    Load,
    PlanDone,
    StepPlan,
)
from hidream_grpc.logs import LogConfig
from hidream_grpc.model.checkpoint.step_shapes import StepShape
from hidream_grpc.model.image_metadata import ImageMetadata
from hidream_grpc.model.parallel.layout import Layout
from hidream_grpc.model.parameters import GenerationParameters, OutputFormat
from hidream_grpc.model.weight_format import WeightFormats

LENGTH_BYTES = 4


@dataclass
class Pair:
    """Both ends of one connection: a rank's, and the server's as a channel and as a raw socket."""

    rank: BlockingChannel[Command]
    server: AsyncChannel[Event]
    server_socket: socket.socket


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    server_socket, rank_socket = socket.socketpair()
    reader, writer = await asyncio.open_unix_connection(sock=server_socket)
    pair = Pair(
        BlockingChannel[Command](rank_socket, Command),
        AsyncChannel[Event](reader, writer, Event),
        writer.get_extra_info("socket"),
    )
    yield pair
    pair.rank.close()
    await pair.server.close()


@pytest.fixture
def raw_and_rank() -> Iterator[tuple[socket.socket, BlockingChannel[Command]]]:
    raw, rank_socket = socket.socketpair()
    rank = BlockingChannel[Command](rank_socket, Command)
    with raw:
        yield raw, rank
    rank.close()


@st.composite
def plans(draw: st.DrawFn) -> StepPlan:
    claim_ids = st.text(max_size=40)
    parameters = st.builds(
        GenerationParameters,
        prompt=st.text(),
        negative_prompt=st.text(),
        width=st.integers(16, 8192),
        height=st.integers(16, 8192),
        num_inference_steps=st.integers(1, 1000),
        guidance_scale=st.floats(0, 100),
        num_images=st.integers(1, 100),
        seed=st.integers(0, 2**63 - 1),
        output_format=st.sampled_from(OutputFormat),
        quality=st.integers(1, 100),
        with_previews=st.booleans(),
    )
    admissions = st.builds(
        Admission,
        claim_id=claim_ids,
        log_fields=st.dictionaries(st.text(max_size=10), st.text(max_size=40), max_size=4),
        parameters=parameters,
    )
    decodes = st.builds(Decode, claim_id=claim_ids, image_index=st.integers(0, 9), rank=st.integers(0, 7))
    return StepPlan(
        plan_id=draw(st.integers(0, 2**63 - 1)),
        releases=tuple(draw(st.lists(claim_ids, max_size=3))),
        admissions=tuple(draw(st.lists(admissions, max_size=3))),
        step_claims=tuple(draw(st.lists(claim_ids, max_size=3))),
        decodes=tuple(draw(st.lists(decodes, max_size=3))),
        decode_budget_seconds=draw(st.none() | st.floats(0, 1000)),
    )


@given(plan=plans())
def test_every_plan_arrives_as_it_was_sent(plan: StepPlan) -> None:
    frame = encode_frame(plan)
    assert struct.unpack("!I", frame[:LENGTH_BYTES]) == (len(frame) - LENGTH_BYTES,)
    assert MessageDecoder[Command](Command).decode(frame[LENGTH_BYTES:]) == plan


async def test_messages_cross_in_both_directions_and_in_order(pair: Pair) -> None:
    load = Load(
        model_path=Path("/models/HiDream"),
        extra_model_path=None,
        checkpoint_fingerprint="86637e71f35d8ddd",
        weights=WeightFormats(),
        layout=Layout(tensor_parallel=2, expert_parallel=2),
        device_type="cpu",
        local_index=3,
        num_threads=2,
        compile_shapes=(StepShape(width=1024, height=768, num_samples=2),),
        image_metadata=ImageMetadata(),
        counter_path=Path("collectives"),
        log=LogConfig(level="DEBUG", format="json", file=Path("a.log")),
    )
    await pair.server.send(load)
    await pair.server.send(StepPlan(plan_id=1))
    assert pair.rank.receive() == load
    assert pair.rank.receive() == StepPlan(plan_id=1)
    pair.rank.send(Hello(rank=3, pid=77))
    pair.rank.send(PlanDone(plan_id=1, encode_seconds=0.0, step_seconds=0.5))
    assert await pair.server.receive() == Hello(rank=3, pid=77)
    assert await pair.server.receive() == PlanDone(plan_id=1, encode_seconds=0.0, step_seconds=0.5)


async def test_the_server_learns_of_a_dead_rank_by_the_end_of_its_stream(pair: Pair) -> None:
    pair.rank.send(GroupBroken(generation=1, reason="its group was lost"))
    pair.rank.close()
    assert await pair.server.receive() == GroupBroken(generation=1, reason="its group was lost")
    assert await pair.server.receive() is None


async def test_sending_to_a_dead_rank_is_no_error_of_its_own(pair: Pair) -> None:
    pair.rank.close()
    for plan_id in range(10):
        await pair.server.send(StepPlan(plan_id=plan_id))
    assert await pair.server.receive() is None


async def test_a_rank_learns_of_a_dead_server_by_the_end_of_its_stream(pair: Pair) -> None:
    await pair.server.close()
    assert pair.rank.receive() is None


@pytest.mark.parametrize("num_bytes", [1, LENGTH_BYTES, LENGTH_BYTES + 1])
async def test_a_frame_that_breaks_off_is_the_end_of_the_peer(pair: Pair, num_bytes: int) -> None:
    frame = encode_frame(Hello(rank=0, pid=1))
    pair.rank._connection.sendall(frame[:num_bytes])
    pair.rank.close()
    assert await pair.server.receive() is None


@pytest.mark.parametrize("num_bytes", [1, LENGTH_BYTES, LENGTH_BYTES + 1])
def test_a_command_that_breaks_off_is_the_end_of_the_server(
    raw_and_rank: tuple[socket.socket, BlockingChannel[Command]], num_bytes: int
) -> None:
    raw, rank = raw_and_rank
    raw.sendall(encode_frame(StepPlan(plan_id=1))[:num_bytes])
    raw.close()
    assert rank.receive() is None


@pytest.mark.parametrize(
    "frame",
    [
        pytest.param(struct.pack("!I", MAX_FRAME_BYTES + 1), id="a length above the limit"),
        pytest.param(struct.pack("!I", 3) + b"\xc1\xc1\xc1", id="no msgpack"),
        pytest.param(struct.pack("!I", 0), id="an empty body"),
        pytest.param(encode_frame(Hello(rank=0, pid=1)), id="a message of the other direction"),
    ],
)
def test_what_is_no_command_is_refused(
    raw_and_rank: tuple[socket.socket, BlockingChannel[Command]], frame: bytes
) -> None:
    raw, rank = raw_and_rank
    raw.sendall(frame)
    with pytest.raises(FrameError):
        rank.receive()


def test_a_message_above_the_limit_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel_module, "MAX_FRAME_BYTES", 100)
    with pytest.raises(FrameError, match="100 are allowed"):
        encode_frame(StepPlan(plan_id=1, step_claims=("j" * 101,)))


async def test_an_image_larger_than_the_stream_buffer_arrives_whole(pair: Pair) -> None:
    image = DecodedImage(claim_id="a", image_index=0, data=bytes(5_000_000), decode_seconds=0.1)
    large = PlanDone(plan_id=1, encode_seconds=0.0, step_seconds=0.0, images=(image,))
    sending = asyncio.to_thread(pair.rank.send, large)
    received, _ = await asyncio.gather(pair.server.receive(), sending)
    assert received == large
