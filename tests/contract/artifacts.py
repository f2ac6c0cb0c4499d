"""Images and snapshots for tests of the artifact store, and a writer that is killed."""

from __future__ import annotations

import asyncio
import random
import sys
from pathlib import Path

from hidream_grpc.jobs.artifacts.artifacts import ArtifactStore, StoredFile
from hidream_grpc.jobs.job import StoredImage
from hidream_grpc.model.parameters import GenerationParameters, OutputFormat

PARAMETERS = GenerationParameters(
    prompt="a red circle",
    width=64,
    height=128,
    num_inference_steps=2,
    guidance_scale=5.0,
    num_images=3,
    seed=40,
    output_format=OutputFormat.WEBP,
)
DATA = bytes(range(256)) * 40
TIMEOUT_SECONDS = 60
ONE, OTHER = "1" * 32, "2" * 32
CLAIM = 3


def image(index: int, claim_number: int = CLAIM) -> StoredImage:
    """What is read: of an image that may not be there."""
    return StoredImage(index, 64, 128, 40 + index, "image/webp", len(DATA), b"", claim_number=claim_number)


async def listed(store: ArtifactStore, max_files: int = 1000) -> list[StoredFile]:
    return [file async for files in store.files(max_files) for file in files]


def files_in(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


NUM_IMAGES = 3
IMAGE_BYTES = 4_000_000
WRITE_UNTIL_KILLED = """
import asyncio, itertools, sys
from hidream_grpc.jobs.artifacts.artifacts import ArtifactStore
from tests.contract.artifacts import CLAIM, IMAGE_BYTES, NUM_IMAGES, PARAMETERS

async def write() -> None:
    store = ArtifactStore(sys.argv[1])
    for number in itertools.count():
        data = bytes([number % 256]) * IMAGE_BYTES
        await store.write("job", CLAIM, number % NUM_IMAGES, PARAMETERS, data)
        print(number, flush=True)

asyncio.run(write())
"""


async def acknowledged_before_a_kill(location: str, moment: random.Random) -> int:
    """Run a writer, kill it at a random moment, and return how many writes it had acknowledged."""
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", WRITE_UNTIL_KILLED, location, stdout=asyncio.subprocess.PIPE
    )
    assert child.stdout is not None
    try:
        lines = [await child.stdout.readline() for _ in range(moment.randrange(1, 5))]
        assert b"" not in lines
        # The moment of the kill, not a wait for something to happen.
        await asyncio.sleep(moment.uniform(0, 0.03))
    finally:
        child.kill()
        rest = await child.stdout.read()
        await child.wait()
    return int([*lines, *rest.splitlines()][-1]) + 1
