from __future__ import annotations

from pathlib import Path

from hidream_grpc.engine.protocol.collective_counter import (
    CollectiveCounterReader,
    CollectiveCounterWriter,
    CollectiveCounts,
)


def test_the_server_sees_when_a_rank_waits(tmp_path: Path) -> None:
    reader = CollectiveCounterReader(tmp_path)
    write = CollectiveCounterWriter(reader.path)
    assert reader.read() == CollectiveCounts(0, 0)
    assert not reader.read().is_waiting
    write(True)
    assert reader.read().is_waiting
    write(False)
    assert reader.read() == CollectiveCounts(1, 1)
    assert not reader.read().is_waiting


def test_the_page_outlives_its_file(tmp_path: Path) -> None:
    reader = CollectiveCounterReader(tmp_path)
    write = CollectiveCounterWriter(reader.path)
    reader.forget_file()
    assert list(tmp_path.iterdir()) == []
    write(True)
    assert reader.read().is_waiting
    reader.forget_file()
