"""Asynchronous, and stopped early: two jobs at once, one of which is cancelled after its first steps."""

import asyncio
import os

from hidream import AsyncClient
from hidream.errors import CancelledError
from hidream.events import ImageFinished, Progress


async def draw(client: AsyncClient) -> None:
    """Draw one image to its end."""
    async for event in client.generate("a green ring on a black background", seed=7):
        if isinstance(event, ImageFinished):
            event.image.save("ring.png")
            print("ring.png is finished")


async def change_my_mind(client: AsyncClient) -> None:
    """Cancel a job after two of its steps."""
    job = await client.submit("a purple triangle", num_inference_steps=100)
    try:
        async for event in client.watch(job):
            if isinstance(event, Progress) and event.step >= 2:
                await client.cancel(job)
    except CancelledError as error:
        print(error)


async def main() -> None:
    """Run both on one connection."""
    async with AsyncClient(os.environ.get("HIDREAM_ADDRESS", "localhost:8088")) as client:
        await asyncio.gather(draw(client), change_my_mind(client))


asyncio.run(main())
