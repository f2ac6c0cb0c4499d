"""A stand-in for the server: two ranks that compute until somebody kills this process.

Prints the process ids of zygote, store and ranks as one line of JSON, once the ranks compute.
"""

from __future__ import annotations

import asyncio
import json

from hidream_grpc.engine.group.rank_group import RankGroup
from tests.support.rank_groups import admission, group_config, picture, plan, store_pid_of, zygote_pid_of


async def main() -> None:
    group = RankGroup(group_config(2))
    await group.start()
    request = picture(width=256, height=256, num_inference_steps=1000)
    await group.execute(plan(admissions=(admission("endless", request),), step_claims=("endless",)))
    print(json.dumps([zygote_pid_of(group), store_pid_of(group), *group.rank_pids]), flush=True)  # noqa: T201
    while True:
        await group.execute(plan(step_claims=("endless",)))


if __name__ == "__main__":
    asyncio.run(main())
