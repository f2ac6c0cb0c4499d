"""Readers that stop reading: run as a process, so that their memory is their own.

Usage: python -m tests.support.stalled_readers ADDRESS NUM_READERS NUM_CHUNKS < request

Each reader is a channel of its own that asks for the request on standard input, reads to the image
chunk of that number and then reads no more. "stalled" on standard output says that all have; they
leave when standard input ends.
"""

from __future__ import annotations

import asyncio
import base64
import sys

import grpc.aio

from hidream.v1 import image_gen_pb2, image_gen_pb2_grpc

CHANNEL_OPTIONS = (
    # Or all channels of a process would share one connection.
    ("grpc.use_local_subchannel_pool", 1),
    # Or a client on the same machine takes megabytes that nobody reads; without it, 64 KiB.
    ("grpc.http2.bdp_probe", 0),
)


async def read_chunks(
    address: str, request: image_gen_pb2.GenerateRequest, num_chunks: int
) -> tuple[grpc.aio.Channel, object]:
    """Read so many image chunks; the channel and the call must be kept, or they end."""
    channel = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
    call = image_gen_pb2_grpc.ImageGenStub(channel).Generate(request)
    while num_chunks > 0:
        response = await call.read()
        if response is grpc.aio.EOF:
            raise AssertionError(f"the stream has ended: {await call.code()}: {await call.details()}")
        assert isinstance(response, image_gen_pb2.GenerateResponse)
        num_chunks -= response.event.HasField("image_chunk")
    return channel, call


async def stall(address: str, num_readers: int, num_chunks: int) -> None:
    """Hold all readers until standard input ends."""
    request = image_gen_pb2.GenerateRequest.FromString(base64.b64decode(sys.stdin.readline()))
    readers = await asyncio.gather(*(read_chunks(address, request, num_chunks) for _ in range(num_readers)))
    sys.stdout.write("stalled\n")
    sys.stdout.flush()
    await asyncio.to_thread(sys.stdin.read)
    await asyncio.gather(*(channel.close() for channel, _ in readers))


if __name__ == "__main__":
    asyncio.run(stall(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
