"""How often a group tries again, and how long it waits, with stand-ins for its processes."""

from __future__ import annotations

import asyncio

import pytest

from hidream_grpc.engine.group import rank_group
from hidream_grpc.engine.group.rank_group import MAX_RECOVERY_TRIES, RankGroup
from hidream_grpc.errors import InsufficientMemoryError, LossCause, RankDiedError
from tests.support.rank_groups import group_config


class StandInProcesses:
    """Ranks that find no memory in their first starts."""

    def __init__(self, num_refusals: int, *, fits_total: bool) -> None:
        self.num_starts = 0
        self.generation = 0
        self.ranks = ()
        self.loss = asyncio.Event()
        self._num_refusals = num_refusals
        self._fits_total = fits_total

    async def listen(self) -> None:
        pass

    async def start_missing(self, _placement: object, _check_memory: object) -> None:
        self.num_starts += 1
        if self.num_starts <= self._num_refusals:
            raise InsufficientMemoryError("dp=2 needs too much", fits_total=self._fits_total)

    async def join_next_generation(self, _limit_seconds: float) -> None:
        self.generation += 1

    async def stop(self) -> None:
        pass


def group_of(processes: StandInProcesses, monkeypatch: pytest.MonkeyPatch) -> RankGroup:
    monkeypatch.setattr(rank_group, "DEVICE_PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(rank_group, "RankProcesses", lambda _config: processes)
    return RankGroup(group_config(2))


async def test_the_first_start_waits_for_memory_that_a_killed_server_has_not_given_back_yet(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    processes = StandInProcesses(2, fits_total=True)
    await group_of(processes, monkeypatch).start()
    assert (processes.num_starts, processes.generation) == (3, 1)


@pytest.mark.parametrize(("fits_total", "num_starts"), [(True, MAX_RECOVERY_TRIES), (False, 1)])
async def test_the_first_start_ends_where_the_memory_does_not_come_or_would_never_do(
    fits_total: bool, num_starts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    processes = StandInProcesses(9, fits_total=fits_total)
    with pytest.raises(InsufficientMemoryError, match="dp=2 needs too much"):
        await group_of(processes, monkeypatch).start()
    assert processes.num_starts == num_starts


class StandInRank:
    """A rank that gives snapshots, or none and no answer either."""

    def __init__(self, rank: int, *, is_silent: bool) -> None:
        self.rank = rank
        self.num_asked = 0
        self.kill_reasons: list[tuple[str, LossCause]] = []
        self._is_silent = is_silent

    async def snapshot_of(self, claim_id: str, _step: int) -> bytes:
        if self.kill_reasons:
            raise RankDiedError((self.rank,), *self.kill_reasons[0])
        self.num_asked += 1
        if self._is_silent:
            await asyncio.Event().wait()
        return claim_id.encode()

    async def kill_hung(self, reason: str, cause: LossCause) -> None:
        self.kill_reasons.append((reason, cause))


async def test_a_rank_that_gives_no_snapshot_is_waited_for_once_and_then_replaced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rank_group, "SNAPSHOT_SECONDS", 0.01)
    silent, answering = ranks = StandInRank(0, is_silent=True), StandInRank(1, is_silent=False)
    processes = StandInProcesses(0, fits_total=True)
    processes.ranks = ranks  # type: ignore[assignment]
    group = group_of(processes, monkeypatch)
    assert await group.snapshot_of("a", 1) == b"a"
    for claim_id in ("b", "c"):
        with pytest.raises(RankDiedError, match="rank 0: gives no snapshot") as lost:
            await group.snapshot_of(claim_id, 1)
        # No job was at work: none is to blame.
        assert lost.value.cause is LossCause.OUTSIDE
    assert (silent.num_asked, len(silent.kill_reasons), answering.num_asked) == (1, 1, 1)
