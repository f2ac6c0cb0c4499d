"""Too little memory is told before anything is loaded; it costs no device and no layout."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio

from hidream_grpc.devices.device_types import DeviceMemory
from hidream_grpc.engine.group import rank_group
from hidream_grpc.engine.group.rank_group import RankGroup
from hidream_grpc.errors import InsufficientMemoryError, RankDiedError
from hidream_grpc.model.parallel.layout import Layout
from tests.support.checkpoints import write_promised, write_tiny_checkpoint
from tests.support.faulty_ranks import Devices, faults, send
from tests.support.rank_groups import draw, group_config, picture
from tests.support.refused_starts import refused_line_here


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_group, "DEVICE_PAUSE_SECONDS", 0.02)


class Room:
    """A check that refuses ranks on demand, notes which ones it is asked about, and finds the room little."""

    def __init__(self) -> None:
        self.refused = 0
        self.refused_layouts: set[Layout] = set()
        self.asked: list[tuple[str, tuple[int, ...]]] = []

    def __call__(self, layout: Layout, devices: Mapping[int, DeviceMemory], host: DeviceMemory) -> str:
        assert all(0 < memory.free_bytes <= memory.total_bytes for memory in (host, *devices.values()))
        self.asked.append((str(layout), tuple(sorted(devices))))
        if layout in self.refused_layouts or self.refused:
            self.refused = max(0, self.refused - 1)
            raise InsufficientMemoryError(f"{layout} needs too much")
        return f"{layout} leaves little"


def two_ranks(room: Room) -> RankGroup:
    return RankGroup(group_config(2, smaller_layouts=(Layout(),), check_memory=room))


def test_a_checkpoint_that_promises_more_than_the_host_has_is_one_line_before_anything_is_loaded(
    tmp_path: Path,
) -> None:
    sizes = {
        "num_layers": 16,
        "num_single_layers": 32,
        "num_attention_heads": 20,
        "attention_head_dim": 128,
        "axes_dims_rope": (64, 32, 32),
        "llama_layers": [0, 1, 2, *[2] * 45],
    }
    folder = write_promised(write_tiny_checkpoint(tmp_path / "tiny"), tmp_path / "large", **sizes)
    data_dir = ("--data-dir", tmp_path / "data")
    line = refused_line_here(["-m", folder, *data_dir, "--listen", "127.0.0.1:0", "--layout", "dp=64"])
    assert line.startswith("hidream-grpc: --layout: dp=64 needs ")
    for words in ("GB of the host's memory for 64 ranks (", "GB of weights, ", "GB free; ", " would fit"):
        assert words in line


async def test_a_layout_that_was_chosen_by_itself_gives_way_to_one_that_has_room(
    caplog: pytest.LogCaptureFixture,
) -> None:
    asked: list[tuple[str, bool]] = []

    def choose(layout: Layout, device: DeviceMemory, host: DeviceMemory) -> Layout:
        asked.append((str(layout), 0 < device.free_bytes < device.total_bytes))
        return Layout()

    group = RankGroup(group_config(2, layout_instead=choose, check_memory=Room()))
    try:
        await group.start()
        assert group.placement.layout == group.full_layout == Layout()
        assert any(line.startswith("layout tp=1 instead: dp=2 is not ") for line in caplog.messages)
        # Once for the memory that is free and once for all that there is; what serves is not changed later.
        assert asked == [("dp=2", True), ("dp=2", False), ("tp=1", True)]
        send(group, signal.SIGKILL, 0)
        await group.wait_for_loss()
        await group.recover()
        assert len(asked) == 3
    finally:
        await group.stop()


@dataclass(frozen=True)
class Rig:
    """Two ranks on devices that can be broken, which ask for room before they load."""

    group: RankGroup
    devices: Devices
    room: Room

    async def lose(self, *ranks: int) -> None:
        send(self.group, signal.SIGKILL, *ranks)
        await self.group.wait_for_loss()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_rig(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Rig]:
    with faults(tmp_path_factory.mktemp("devices")) as devices:
        group = two_ranks(room := Room())
        try:
            await group.start()
            yield Rig(group, devices, room)
        finally:
            await group.stop()


@pytest_asyncio.fixture(loop_scope="module")
async def rig(shared_rig: Rig) -> AsyncIterator[Rig]:
    """The shared one, which draws in its full layout before and after each test."""
    shared_rig.room.asked.clear()
    yield shared_rig
    shared_rig.devices.repair_all()
    shared_rig.room.refused_layouts.clear()
    await shared_rig.group.recover()
    assert shared_rig.group.placement.layout == shared_rig.group.full_layout
    assert await draw(shared_rig.group, picture())


@pytest.mark.asyncio(loop_scope="module")
async def test_ranks_without_room_are_refused_together_and_nothing_smaller_is_tried(rig: Rig) -> None:
    rig.room.refused_layouts = {rig.group.full_layout}
    await rig.lose(0, 1)
    with pytest.raises(RankDiedError, match="dp=2 needs too much"):
        await rig.group.recover()
    assert {layout for layout, _ in rig.room.asked} == {"dp=2"}
    assert rig.room.asked[-1] == ("dp=2", (0, 1))
    assert rig.group.loaded == ()


@pytest.mark.asyncio(loop_scope="module")
async def test_a_smaller_layout_without_room_is_not_loaded_when_a_device_is_lost(rig: Rig) -> None:
    rig.room.refused_layouts = {Layout()}
    rig.devices.break_(1)
    await rig.lose(1)
    with pytest.raises(
        RankDiedError, match="device 1 has fallen off the bus; without it, tp=1 needs too much"
    ):
        await rig.group.recover()
    assert rig.group.loaded == ()


@pytest.mark.asyncio(loop_scope="module")
async def test_a_rank_waits_for_the_memory_of_the_one_that_it_replaces_and_the_others_stay(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    survivor = rig.group.rank_pids[0]
    rig.room.refused = 2
    await rig.lose(1)
    await rig.group.recover()
    assert rig.room.asked == [("dp=2", (1,))] * 3
    assert rig.group.rank_pids[0] == survivor
    assert caplog.messages.count("little memory: dp=2 leaves little") == 1


@pytest.mark.asyncio(loop_scope="module")
async def test_a_lack_of_memory_while_loading_is_not_taken_for_a_broken_device(rig: Rig) -> None:
    survivor = rig.group.rank_pids[0]
    rig.devices.take_memory_of(1)
    await rig.lose(1)
    with pytest.raises(RankDiedError, match="rank 1 cannot load: MemoryError: no memory for a buffer"):
        await rig.group.recover()
    assert rig.group.placement.layout == rig.group.full_layout
    assert rig.group.rank_pids == (survivor,)
