"""Adds and draws jobs for ever and says what it was told is durable, until it is killed."""

from __future__ import annotations

import asyncio
import random
import sys
import uuid

from hidream_grpc.jobs.store.store import SqlJobStore
from tests.support.job_stores import added, claimed, finished, new_job


def say(word: str, job_id: str) -> None:
    sys.stdout.write(f"{word} {job_id}\n")
    sys.stdout.flush()


async def main(url: str) -> None:
    store = SqlJobStore(url)
    await store.open()
    while True:
        size = random.randint(1, 3)
        labels = {"batch": uuid.uuid4().hex, "size": str(size)}
        for job in await added(store, *(new_job(labels=labels) for _ in range(size))):
            say("added", job.job_id)
        for job in await claimed(store):
            await finished(store, job)
            say("succeeded", job.job_id)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
