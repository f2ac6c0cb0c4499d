"""From a lost rank group to one that works again, and what its survivors still know."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping

from hidream_grpc.engine.group.rank_group import RankGroup
from hidream_grpc.engine.requests import EngineState
from hidream_grpc.engine.running_request import Snapshot
from hidream_grpc.errors import RankDiedError

logger = logging.getLogger(__name__)

RECOVERY_PAUSE_SECONDS = (1.0, 2.0, 5.0, 10.0, 30.0)


async def bring_back(
    group: RankGroup,
    on_state: Callable[[EngineState], None],
    keep_snapshots: Callable[[], Awaitable[None]],
) -> None:
    """Recover the group, however often it takes; between two tries the engine has failed.

    Args:
        group: to recover.
        on_state: told of it.
        keep_snapshots: called before ranks go that are still there, for a layout of other ranks.
    """
    failures = 0
    while True:
        try:
            replaced = await group.recover(keep_snapshots)
        except RankDiedError as loss:
            reason = str(loss)
        else:
            logger.info("the rank group is back: generation %d, replaced %s", group.generation, replaced)
            return
        on_state(EngineState.FAILED)
        pause_seconds = RECOVERY_PAUSE_SECONDS[min(failures, len(RECOVERY_PAUSE_SECONDS) - 1)]
        failures += 1
        logger.error("the rank group does not come back: %s; next try in %g s", reason, pause_seconds)
        await asyncio.sleep(pause_seconds)


async def committed_snapshots(group: RankGroup, steps: Mapping[str, int]) -> dict[str, Snapshot]:
    """What the ranks have of these jobs after exactly these steps; a job at its seed needs none.

    Raises:
        RankDiedError: a rank died.
    """
    snapshots = {}
    for claim_id, step in steps.items():
        if step and (data := await group.snapshot_of(claim_id, step)):
            snapshots[claim_id] = Snapshot(step, data)
    return snapshots
